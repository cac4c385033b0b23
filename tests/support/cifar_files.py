"""A CIFAR-10 batch as the published files hold it."""

import struct

import numpy as np


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's cPickle wrote, as in the published files."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    n, width = pixels.shape
    shape = b"(M" + struct.pack("<H", n) + b"M" + struct.pack("<H", width) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00t" + text(b"b")
    array = array.replace(b"(K\x00t", b"K\x00\x85") + b"\x87R(K\x01" + shape + dtype
    array += b"\x89" + raw + b"tb"
    entries = text(b"data") + array
    entries += text(b"labels") + b"](" + b"".join(b"K" + bytes([x]) for x in labels) + b"e"
    return b"\x80\x02}(" + entries + b"u."
