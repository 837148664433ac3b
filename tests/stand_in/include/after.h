// After it: a launch is a piece of work that holds copies of the parameters.
#pragma once

template <class... A, size_t... I>
static Work* bound(void (*f)(A...), const unsigned* d, void** params, std::index_sequence<I...>) {
  std::tuple<std::remove_cv_t<A>...> args(*(std::remove_cv_t<A>*)params[I]...);
  dim3 grid(d[0], d[1], d[2]), block(d[3], d[4], d[5]);
  return new Work([=] {
    gridDim = grid, blockDim = block;
    Work body = [&] { std::apply(f, args); };
    each_thread(grid, [&](uint3 index) {
      blockIdx = index;
      run_block(block, body);
    });
  });
}
template <class... A> static Work* bound(void (*f)(A...), const unsigned* dims, void** params) {
  return bound(f, dims, params, std::index_sequence_for<A...>{});
}
