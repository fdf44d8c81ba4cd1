"""Signatures: what is accepted, what is refused, and that a bad one never leads to unsigned data."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.reader import Lookup, fetch
from imaging.simplestreams.signing import Signer, Verifier, binary_keyring
from tests.simplestreams.catalogues import ENDPOINT, entry, index, item, key, product, products, signed, source, tree

WANTED = ImageConstraint("us-east-1", ENDPOINT, ["precise"], ["amd64"])
S_INDEX = "streams/v1/index.sjson"
S_PRODUCTS = "streams/v1/products.sjson"
UNKNOWN = "cannot read index data, cannot read URL data, openpgp: signature made by unknown entity"
TAMPERED = "cannot read index data, cannot read URL data, openpgp: invalid signature: hash tag doesn't match"
PLAIN = "cannot read index data, cannot read URL data, no PGP signature embedded in plain text data"


def verifier(name: str = "catalogue") -> Verifier:
    return Verifier(key(name).public)


def failure(documents: dict[str, bytes], **lookup: object) -> MistifyError:
    with pytest.raises(MistifyError) as caught:
        fetch([source(documents)], WANTED, Lookup(verifier=verifier(), **lookup))  # type: ignore[arg-type]
    return caught.value


def test_clearsigned_text_is_what_was_signed(tmp_path: Path) -> None:
    text = b'{\n "a": [\n- 1]}\n'
    with Signer(key().private) as signer:
        document = signer.clearsign(b"\n" + text)
        detached = signer.detach_sign(text)
        assert signer.public_key().startswith(b"-----BEGIN PGP PUBLIC KEY BLOCK-----")
    assert b"Hash: SHA512" in document
    assert b"- - 1]}" in document
    verified = verifier().verify_clearsigned(document)
    assert (verified.text, verified.fingerprint) == (text, verifier().verify_detached(text, detached).fingerprint)
    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(binary_keyring(key().public))
    assert Verifier.from_file(keyring).verify_clearsigned(document) == verified


def test_text_around_the_signed_text_does_not_exist() -> None:
    with Signer(key().private) as signer:
        document = signer.clearsign(b'{"good": 1}\n')
    around = b'{"evil": 1}\n' + document + b'{"evil": 2}\n'
    assert verifier().verify_clearsigned(around).text == b'{"good": 1}\n'


def test_second_signed_text_does_not_exist_either() -> None:
    with Signer(key().private) as signer, Signer(key("stranger").private) as stranger:
        first, second = signer.clearsign(b'{"good": 1}\n'), stranger.clearsign(b'{"evil": 1}\n')
        again = signer.clearsign(b'{"other": 1}\n')
    for behind in (second, again):
        assert verifier().verify_clearsigned(first + behind).text == b'{"good": 1}\n'
    with pytest.raises(BadDataError):
        verifier().verify_clearsigned(second + first)


def test_line_that_gpg_would_cut_is_refused_on_either_side() -> None:
    with Signer(key().private) as signer:
        longest = b"x" * 19_990
        document = signer.clearsign(longest + b"\n")
        assert verifier().verify_clearsigned(document).text == longest + b"\n"
        with pytest.raises(InvalidArgumentError, match="line longer than"):
            signer.clearsign(longest + b"x\n")
    with pytest.raises(BadDataError, match="line longer than"):
        verifier().verify_clearsigned(document.replace(longest, longest + b"x"))


def test_key_with_a_passphrase_signs_only_with_it() -> None:
    with Signer(key().private) as signer:
        signer._passphrase = "unused for a key without one"
        assert signer.clearsign(b"x\n")
    with pytest.raises(InvalidArgumentError, match=r"^failed to parse private key"):
        Signer(b"nonsense")


@pytest.mark.parametrize("keyring", [b"", b"nonsense", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n=\n"])
def test_keyring_that_is_none_is_refused(keyring: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^failed to parse public key: "):
        Verifier(keyring)


def test_detached_signature_over_something_else_is_refused() -> None:
    with Signer(key().private) as signer:
        detached = signer.detach_sign(b"this")
    with pytest.raises(BadDataError, match=r"hash tag doesn't match"):
        verifier().verify_detached(b"that", detached)
    with pytest.raises(BadDataError, match=r"unknown entity"):
        verifier("stranger").verify_detached(b"this", detached)
    with pytest.raises(BadDataError):
        verifier().verify_detached(b"this", b"")


# -- lookups ---------------------------------------------------------------------------------------------------------------


def test_signed_side_is_preferred() -> None:
    images, info = fetch([source(signed(tree()))], WANTED, Lookup(verifier=verifier(), only_signed=True))
    assert [image.id for image in images] == ["ami-1"]
    assert info is not None
    assert (info.signed, info.index_url) == (True, "test://memory/streams/v1/index.sjson")


def test_unsigned_tree_is_read_unless_only_signed_counts() -> None:
    _, info = fetch([source()], WANTED, Lookup(verifier=verifier()))
    assert info is not None
    assert not info.signed
    err = failure(tree(), only_signed=True)
    assert (type(err), err.message) == (NotFoundError, 'invalid URL "test://memory/streams/v1/index.sjson" not found')


def test_only_signed_without_a_key_is_an_error() -> None:
    with pytest.raises(BadDataError, match=r"failed to parse public key"):
        fetch([source(signed(tree()))], WANTED, Lookup(only_signed=True))


def swapped(documents: dict[str, bytes], path: str, data: bytes) -> dict[str, bytes]:
    return documents | {path: data}


def bad_trees() -> dict[str, tuple[dict[str, bytes], str]]:
    good = signed(tree())
    stranger = signed(tree(), "stranger")
    product_prefix = "cannot read product data, cannot read URL data, "
    return {
        "index by a stranger": (swapped(good, S_INDEX, stranger[S_INDEX]), UNKNOWN),
        "index changed": (swapped(good, S_INDEX, good[S_INDEX].replace(b"2013", b"2014", 1)), TAMPERED),
        "index not signed": (swapped(good, S_INDEX, good["streams/v1/index.json"]), PLAIN),
        "index empty": (swapped(good, S_INDEX, b""), PLAIN),
        "signature cut off": (swapped(good, S_INDEX, good[S_INDEX][:-120]), ""),
        "products by a stranger": (
            swapped(good, S_PRODUCTS, stranger[S_PRODUCTS]),
            product_prefix + "openpgp: signature made by unknown entity",
        ),
        "products changed": (
            swapped(good, S_PRODUCTS, good[S_PRODUCTS].replace(b"ami-1", b"ami-2", 1)),
            product_prefix + "openpgp: invalid signature: hash tag doesn't match",
        ),
        "products not signed": (
            swapped(good, S_PRODUCTS, good["streams/v1/products.json"]),
            product_prefix + "no PGP signature embedded in plain text data",
        ),
    }


@pytest.mark.parametrize("case", list(bad_trees()))
def test_bad_signature_never_leads_to_unsigned_data(case: str) -> None:
    documents, text = bad_trees()[case]
    err = failure(documents)
    assert type(err) is BadDataError
    assert err.message.startswith(text or "cannot read index data, cannot read URL data, ")
    if text:
        assert err.message == text
    assert type(failure(documents, only_signed=True)) is BadDataError


@pytest.mark.parametrize("case", list(bad_trees()))
def test_bad_signature_leads_to_unsigned_data_for_the_original(case: str) -> None:
    images, info = fetch([source(bad_trees()[case][0])], WANTED, Lookup(verifier=verifier(), compat=True))
    assert ([image.id for image in images], info and info.signed) == (["ami-1"], False)
    with pytest.raises(BadDataError):
        fetch([source(bad_trees()[case][0])], WANTED, Lookup(verifier=verifier(), compat=True, only_signed=True))


def test_signed_index_that_names_unsigned_products_is_refused() -> None:
    with Signer(key().private) as signer:
        documents = tree() | {S_INDEX: signer.clearsign(tree()["streams/v1/index.json"])}
    assert failure(documents).message == (
        "cannot read product data, cannot read URL data, no PGP signature embedded in plain text data"
    )


def test_signed_index_without_a_match_leads_to_the_unsigned_one_unless_only_signed_counts() -> None:
    unsigned = tree(None, products({"com.ubuntu.cloud:server:12.04:amd64": product(v1={"a": item("plain")})}))
    other = signed(tree(index(entry("something:else"))), keep_unsigned=False)
    images, info = fetch([source(unsigned | other)], WANTED, Lookup(verifier=verifier()))
    assert ([image.id for image in images], info and info.signed) == (["plain"], False)
    assert fetch([source(unsigned | other)], WANTED, Lookup(verifier=verifier(), only_signed=True))[0] == []


def test_signature_is_checked_by_the_real_program_too(tmp_path: Path) -> None:
    import subprocess

    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(binary_keyring(key().public))
    (tmp_path / "index.sjson").write_bytes(signed(tree())[S_INDEX])
    command = ["gpgv", "--keyring", str(keyring), str(tmp_path / "index.sjson")]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
