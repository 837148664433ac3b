// CuPy's bfloat16: the upper half of a float, rounded to the nearest even.
#pragma once
#include "cupy/carray.cuh"

class bfloat16 {
  unsigned short bits;

 public:
  bfloat16() {}
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>> bfloat16(T x) {
    float f = (float)x;
    unsigned u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    unsigned u = unsigned(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
