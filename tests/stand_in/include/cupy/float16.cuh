// CuPy's float16, by the compiler's.
#pragma once
#include "cupy/carray.cuh"

class float16 {
  _Float16 value;

 public:
  float16() {}
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>> float16(T x) : value((_Float16)x) {}
  operator float() const { return (float)value; }
};
