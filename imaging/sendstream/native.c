/*
 * The codec's inner loops: Fletcher-4, sealing records, walking records whose checksums hold, finding blocks of zeros.
 *
 * Optional: without a compiler numpy does the same (imaging/sendstream/backend.py decides). Input comes from strangers, so
 * every length is compared with what is left of its buffer before it is used, sizes are read once, nothing assumes
 * alignment or the machine's byte order, and sums are unsigned, whose overflow is defined. No allocation depends on what a record
 * says. Anything out of the ordinary ends a walk early; the caller's Python code then looks at it and finds the words.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum {
    REVISION = 1,            /* what backend.py expects: a stale build in a checkout must not be used */
    HEADER_BYTES = 312,
    SEALED_BYTES = 280,      /* of a header, covered by the checksum that follows */
    CHECKSUM_BYTES = 32,
    TYPE_WRITE = 3,
    TYPE_FREE = 4,
    AT_OFFSET = 24,          /* of a WRITE: offset, logical size, block checksum and properties, compressed size */
    AT_LOGICAL = 32,
    AT_COMPRESSION = 50,
    AT_BLOCK_CHECKSUM = 56,
    AT_COMPRESSED = 96,
    RUNS_MAX = 1024,         /* a walk reports no more than this; the caller walks again */
    UNLOCKED_MIN_BYTES = 32 << 10, /* less is done before another thread could take the interpreter lock */
};
#define PAYLOAD_MAX_BYTES ((uint64_t)16 << 20)

typedef struct { unsigned long long a, b, c, d; } Sums; /* 64 bits wherever Python runs */
typedef struct { size_t start, count, stride; } Run;

/* Bytes to little-endian words; compilers make one load or store of each. */
static inline uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t load64(const uint8_t *p)
{
    return (uint64_t)load32(p) | (uint64_t)load32(p + 4) << 32;
}

static inline void store64(uint8_t *p, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(value >> (8 * i));
}

static void store_sums(uint8_t *p, Sums s)
{
    store64(p, s.a);
    store64(p + 8, s.b);
    store64(p + 16, s.c);
    store64(p + 24, s.d);
}

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define HAS_LANES 1
enum { LANES = 8, LANES_BYTES = 4 * LANES, ROUNDS_MAX = 1 << 17 }; /* so that the product of three word counts fits into 64 bits */
typedef uint64_t Half __attribute__((vector_size(LANES_BYTES)));

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
static void sum_lanes(const uint8_t *p, size_t rounds, Half out[4][2])
{
    const Half low = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
    Half a0 = {0}, a1 = {0}, b0 = {0}, b1 = {0}, c0 = {0}, c1 = {0}, d0 = {0}, d1 = {0};
    for (; rounds; rounds--, p += LANES_BYTES) {
        Half words;
        memcpy(&words, p, sizeof words);
        a0 += words & low;
        a1 += words >> 32;
        b0 += a0, b1 += a1;
        c0 += b0, c1 += b1;
        d0 += c0, d1 += c1;
    }
    out[0][0] = a0, out[0][1] = a1, out[1][0] = b0, out[1][1] = b1;
    out[2][0] = c0, out[2][1] = c1, out[3][0] = d0, out[3][1] = d1;
}

/*
 * Eight sums side by side, each over every eighth word. A word that is the q-th last of lane j is the k-th last of all, k = 8q - j, and
 * counts 1, k, k(k+1)/2 and k(k+1)(k+2)/6 times where its lane counted it 1, q, q(q+1)/2 and q(q+1)(q+2)/6 times: below, the
 * former by the latter. Sums before count as k zeros after them would make them.
 */
static Sums feed_lanes(Sums s, const uint8_t *p, size_t rounds)
{
    Half lanes[4][2];
    sum_lanes(p, rounds, lanes);
    Sums all = {0, 0, 0, 0};
    for (uint64_t j = 0; j < LANES; j++) {
        uint64_t a = lanes[0][j % 2][j / 2], b = lanes[1][j % 2][j / 2];
        uint64_t c = lanes[2][j % 2][j / 2], d = lanes[3][j % 2][j / 2];
        all.a += a;
        all.b += 8 * b - j * a;
        all.c += 64 * c - (28 + 8 * j) * b + j * (j - 1) / 2 * a;
        all.d += 512 * d - (448 + 64 * j) * c + (56 + 24 * j + 4 * j * j) * b - (j < 2 ? 0 : j * (j - 1) * (j - 2) / 6) * a;
    }
    uint64_t n = rounds * LANES, n2 = n * (n + 1) / 2, n3 = n * (n + 1) * (n + 2) / 6;
    all.d += s.d + n * s.c + n2 * s.b + n3 * s.a;
    all.c += s.c + n * s.b + n2 * s.a;
    all.b += s.b + n * s.a;
    all.a += s.a;
    return all;
}
#endif

/* The last 1 to 3 bytes of a piece are no word and count for nothing, as the format says. */
static Sums feed(Sums s, const uint8_t *p, size_t size)
{
#ifdef HAS_LANES
    while (size >= 16 * LANES_BYTES) { /* less is sooner done word by word */
        size_t rounds = size / LANES_BYTES < ROUNDS_MAX ? size / LANES_BYTES : ROUNDS_MAX;
        s = feed_lanes(s, p, rounds);
        p += rounds * LANES_BYTES;
        size -= rounds * LANES_BYTES;
    }
#endif
    for (const uint8_t *end = p + (size & ~(size_t)3); p != end; p += 4) {
        s.a += load32(p);
        s.b += s.a;
        s.c += s.b;
        s.d += s.c;
    }
    return s;
}

/* The sums after a record's sealed part and its checksum, which is put there. */
static Sums seal_record(Sums s, uint8_t *checksum)
{
    store_sums(checksum, s);
    return feed(s, checksum, CHECKSUM_BYTES);
}

static int all_zero(const uint8_t *p, size_t size)
{
    return size == 0 || (p[0] == 0 && memcmp(p, p + 1, size - 1) == 0);
}

/* Whether a stated checksum is right; zeros state none. */
static int holds(Sums s, const uint8_t *stated)
{
    uint8_t expected[CHECKSUM_BYTES];
    store_sums(expected, s);
    return memcmp(expected, stated, CHECKSUM_BYTES) == 0 || all_zero(stated, CHECKSUM_BYTES);
}

/* Whether a WRITE is like the one before it, `stride` bytes earlier, but for the next place: plain data, side by side.
   What the sender says of its own block checksum may differ; nobody relies on it. */
static int continues(const uint8_t *header, size_t stride)
{
    const uint8_t *before = header - stride;
    uint64_t size = load64(before + AT_LOGICAL), offset = load64(before + AT_OFFSET);
    return load32(before) == TYPE_WRITE && before[AT_COMPRESSION] == 0 && offset <= UINT64_MAX - size
        && load64(header + AT_OFFSET) == offset + size
        && memcmp(before, header, AT_OFFSET) == 0
        && memcmp(before + AT_LOGICAL, header + AT_LOGICAL, AT_BLOCK_CHECKSUM - AT_LOGICAL) == 0
        && memcmp(before + AT_COMPRESSED, header + AT_COMPRESSED, SEALED_BYTES - AT_COMPRESSED) == 0;
}

/* Size of the record at `p`, of which `left` bytes are there; 0 if it is not whole, not plain, or makes no sense. */
static size_t record_size(const uint8_t *p, size_t left)
{
    uint64_t payload = 0;
    if (left < HEADER_BYTES)
        return 0;
    if (load32(p) == TYPE_WRITE)
        payload = load64(p + (p[AT_COMPRESSION] ? AT_COMPRESSED : AT_LOGICAL));
    else if (load32(p) != TYPE_FREE)
        return 0;
    if (payload > PAYLOAD_MAX_BYTES || payload % 8 || payload > left - HEADER_BYTES)
        return 0;
    return HEADER_BYTES + (size_t)payload;
}

/* Take records from `*at` on as long as they are sound; how many runs of equal ones were found. */
static size_t walk_records(Sums *sums, const uint8_t *data, size_t size, size_t *at, Run *runs)
{
    size_t found = 0, record;
    while ((record = record_size(data + *at, size - *at)) != 0) {
        const uint8_t *header = data + *at;
        Run *run = found ? &runs[found - 1] : NULL;
        int joins = run && run->stride == record && continues(header, record);
        Sums sealed = feed(*sums, header, SEALED_BYTES);
        if ((!joins && found == RUNS_MAX) || !holds(sealed, header + SEALED_BYTES))
            break;
        *sums = feed(sealed, header + SEALED_BYTES, record - SEALED_BYTES);
        if (joins)
            run->count++;
        else
            runs[found++] = (Run){*at, 1, record};
        *at += record;
    }
    return found;
}

/* -- Python ---------------------------------------------------------------------------------------------------------- */

static PyThreadState *unlock(Py_ssize_t size)
{
    return size >= UNLOCKED_MIN_BYTES ? PyEval_SaveThread() : NULL;
}

static void lock(PyThreadState *state)
{
    if (state)
        PyEval_RestoreThread(state);
}

/* What every function ends with. */
static PyObject *release(Py_buffer *one, Py_buffer *other, PyObject *out)
{
    PyBuffer_Release(one);
    if (other)
        PyBuffer_Release(other);
    return out;
}

static int64_t number_at(const Py_buffer *numbers, Py_ssize_t index)
{
    int64_t value;
    memcpy(&value, (const char *)numbers->buf + index * 8, 8);
    return value;
}

/* Native 64-bit integers that ascend by at least `gap`, are whole words, and leave room for `room` bytes in `size`. */
static int check_places(const Py_buffer *places, Py_ssize_t size, int64_t gap, int64_t room)
{
    int64_t least = 0;
    int good = places->len % 8 == 0 && places->len <= PY_SSIZE_T_MAX / 8;
    for (Py_ssize_t i = 0; good && i < places->len / 8; i++) {
        int64_t place = number_at(places, i);
        good = place >= least && place % 4 == 0 && place <= (int64_t)size - room;
        least = good ? place + gap : 0;
    }
    if (!good)
        PyErr_SetString(PyExc_ValueError, "positions that do not ascend inside the data");
    return good;
}

static PyObject *trace(PyObject *Py_UNUSED(module), PyObject *args)
{
    Sums s;
    Py_buffer data, places;
    PyObject *out = NULL;
    if (!PyArg_ParseTuple(args, "(KKKK)y*y*:trace", &s.a, &s.b, &s.c, &s.d, &data, &places))
        return NULL;
    Py_ssize_t last = 0, count = places.len / 8;
    if (check_places(&places, data.len, 0, 0))
        out = PyBytes_FromStringAndSize(NULL, count * CHECKSUM_BYTES);
    if (out) {
        uint8_t *to = (uint8_t *)PyBytes_AsString(out);
        PyThreadState *locked = unlock(data.len);
        for (Py_ssize_t i = 0; i <= count; i++) {
            Py_ssize_t place = i < count ? (Py_ssize_t)number_at(&places, i) : data.len;
            s = feed(s, (const uint8_t *)data.buf + last, (size_t)(place - last));
            if (i < count)
                store_sums(to + i * CHECKSUM_BYTES, s);
            last = place;
        }
        lock(locked);
        out = Py_BuildValue("((KKKK)N)", s.a, s.b, s.c, s.d, out);
    }
    return release(&data, &places, out);
}

static PyObject *seal(PyObject *Py_UNUSED(module), PyObject *args)
{
    Sums s;
    Py_buffer data, starts;
    PyObject *out = NULL;
    if (!PyArg_ParseTuple(args, "(KKKK)w*y*:seal", &s.a, &s.b, &s.c, &s.d, &data, &starts))
        return NULL;
    if (check_places(&starts, data.len, HEADER_BYTES, HEADER_BYTES)) {
        uint8_t *bytes = data.buf;
        Py_ssize_t last = 0;
        PyThreadState *locked = unlock(data.len);
        for (Py_ssize_t i = 0; i < starts.len / 8; i++) {
            Py_ssize_t checksum = (Py_ssize_t)number_at(&starts, i) + SEALED_BYTES;
            s = seal_record(feed(s, bytes + last, (size_t)(checksum - last)), bytes + checksum);
            last = checksum + CHECKSUM_BYTES;
        }
        s = feed(s, bytes + last, (size_t)(data.len - last));
        lock(locked);
        out = Py_BuildValue("(KKKK)", s.a, s.b, s.c, s.d);
    }
    return release(&data, &starts, out);
}

/* `to` has room for `count` records. */
static Sums put_writes(Sums s, uint8_t *to, const uint8_t *header, const uint8_t *rows, size_t count, size_t block)
{
    uint64_t offset = load64(header + AT_OFFSET);
    for (size_t i = 0; i < count; i++, to += HEADER_BYTES + block, rows += block, offset += block) {
        memcpy(to, header, SEALED_BYTES);
        store64(to + AT_OFFSET, offset);
        s = seal_record(feed(s, to, SEALED_BYTES), to + SEALED_BYTES);
        memcpy(to + HEADER_BYTES, rows, block);
        s = feed(s, to + HEADER_BYTES, block);
    }
    return s;
}

static PyObject *seal_writes(PyObject *Py_UNUSED(module), PyObject *args)
{
    Sums s;
    Py_buffer header, rows;
    Py_ssize_t block;
    PyObject *out = NULL;
    if (!PyArg_ParseTuple(args, "(KKKK)y*y*n:seal_writes", &s.a, &s.b, &s.c, &s.d, &header, &rows, &block))
        return NULL;
    if (header.len != SEALED_BYTES || block <= 0 || block % 4 || rows.len % block
        || rows.len / block > (PY_SSIZE_T_MAX - rows.len) / HEADER_BYTES) {
        PyErr_SetString(PyExc_ValueError, "not a header and whole blocks");
    } else if ((out = PyBytes_FromStringAndSize(NULL, rows.len + rows.len / block * HEADER_BYTES)) != NULL) {
        PyThreadState *locked = unlock(rows.len);
        s = put_writes(s, (uint8_t *)PyBytes_AsString(out), header.buf, rows.buf, (size_t)(rows.len / block), (size_t)block);
        lock(locked);
        out = Py_BuildValue("((KKKK)N)", s.a, s.b, s.c, s.d, out);
    }
    return release(&header, &rows, out);
}

static PyObject *zero_blocks(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    Py_ssize_t stride, skip;
    PyObject *out = NULL;
    if (!PyArg_ParseTuple(args, "y*nn:zero_blocks", &data, &stride, &skip))
        return NULL;
    if (stride <= 0 || data.len % stride || skip < 0 || skip > stride)
        PyErr_SetString(PyExc_ValueError, "not whole blocks");
    else
        out = PyBytes_FromStringAndSize(NULL, data.len / stride);
    if (out) {
        uint8_t *to = (uint8_t *)PyBytes_AsString(out);
        PyThreadState *locked = unlock(data.len);
        for (Py_ssize_t i = 0; i < data.len / stride; i++)
            to[i] = (uint8_t)all_zero((const uint8_t *)data.buf + i * stride + skip, (size_t)(stride - skip));
        lock(locked);
    }
    return release(&data, NULL, out);
}

static PyObject *run_list(const Run *runs, size_t found)
{
    PyObject *list = PyList_New((Py_ssize_t)found);
    for (size_t i = 0; list && i < found; i++) {
        Py_ssize_t start = (Py_ssize_t)runs[i].start, count = (Py_ssize_t)runs[i].count, stride = (Py_ssize_t)runs[i].stride;
        PyObject *run = Py_BuildValue("(nnn)", start, count, stride);
        if (!run || PyList_SetItem(list, (Py_ssize_t)i, run) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *walk(PyObject *Py_UNUSED(module), PyObject *args)
{
    Sums s;
    Py_buffer data;
    Py_ssize_t start;
    PyObject *out = NULL;
    Run runs[RUNS_MAX];
    if (!PyArg_ParseTuple(args, "(KKKK)y*n:walk", &s.a, &s.b, &s.c, &s.d, &data, &start))
        return NULL;
    if (start < 0 || start > data.len) {
        PyErr_SetString(PyExc_ValueError, "a start outside the data");
    } else {
        size_t at = (size_t)start;
        PyThreadState *locked = unlock(data.len - start);
        size_t found = walk_records(&s, data.buf, (size_t)data.len, &at, runs);
        lock(locked);
        out = Py_BuildValue("((KKKK)nN)", s.a, s.b, s.c, s.d, (Py_ssize_t)at, run_list(runs, found));
    }
    return release(&data, NULL, out);
}

static PyMethodDef methods[] = {
    {"trace", trace, METH_VARARGS, "trace(state, data, positions): the state after data; 32 bytes for that at each position."},
    {"seal", seal, METH_VARARGS, "seal(state, data, starts): put checksums into whole records; the state after data."},
    {"seal_writes", seal_writes, METH_VARARGS, "seal_writes(state, header, rows, block): the state after records, and these."},
    {"zero_blocks", zero_blocks, METH_VARARGS, "zero_blocks(data, stride, skip): a byte for each block, 1 if it is all zeros."},
    {"walk", walk, METH_VARARGS, "walk(state, data, start): the state after sound records, where they end, runs of them."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "native", "The codec's inner loops in C.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "REVISION", REVISION) < 0)
        Py_CLEAR(module);
    return module;
}
