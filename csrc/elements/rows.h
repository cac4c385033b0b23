// A row of a panel, put to a vector or taken from it: each product and each sum is rounded.
// Included once an instruction set, and for CUDA.

template <class V, class T>
LYAPCUDA_INLINE V with_row(V sum, V row, T by) {
  return sum + row * by;
}

template <class V, class T>
LYAPCUDA_INLINE V without_row(V left, V row, T by) {
  return left - row * by;
}
