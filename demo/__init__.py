"""The whole system shown at work: what ``make demo`` and ``make run`` execute.

Not part of the installed programs; the daemons import nothing from here. ``debian`` fetches packages, ``guest`` makes a bootable
disk of them, ``qemu`` boots a disk and listens to its serial console, ``daemons`` starts both servers, ``story`` is the demo itself.
"""
