"""JAX on the CPU: immutable, legacy capsules without flags, bfloat16 and float8, layouts of its own, tracers."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb

DTYPES = [
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64",
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
SHAPES = [(3,), (2, 3), (), (0, 3), (1, 4, 1), (1000, 100)]


def ones(dtype, shape=(2, 3)):
    return jnp.ones(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_shared_with_numpy_and_cannot_be_written(dtype):
    x = ones(dtype)
    a = tb.to_numpy(x, copy=False)
    assert a.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert a.ctypes.data == x.unsafe_buffer_pointer()
    with pytest.raises(ValueError, match="read-only"):
        a[...] = 0
    assert a.astype("complex64").tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_copied_for_torch_and_the_immutable_array_stays_so(dtype):
    x = ones(dtype)
    assert not tb.plan(x, "torch").zero_copy
    t = tb.to_torch(x)
    assert t.dtype is getattr(torch, dtype)
    t.view(torch.uint8).zero_()
    assert (np.asarray(x).astype("complex64") == 1).all()
    with pytest.raises(tb.CopyRequiredError, match="read-only"):
        tb.to_torch(x, copy=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_shared_with_torch_on_the_caller_s_word(dtype):
    x = ones(dtype)
    t = tb.to_torch(x, share_readonly=True, copy=False)
    assert (t.data_ptr(), t.dtype) == (x.unsafe_buffer_pointer(), getattr(torch, dtype))
    assert tb.shares_memory(x, t)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape):
    x = jnp.arange(np.prod(shape, dtype=int), dtype="float32").reshape(shape)
    for convert in (tb.to_numpy, tb.to_torch):
        result = convert(x)
        assert tuple(result.shape) == shape
        assert result.tolist() == x.tolist()
    assert tb.describe(x).shape == shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.T,
        lambda x: x[::-1],
        lambda x: x[:, 1],
        lambda x: x[::2, ::-1],
        lambda x: jnp.broadcast_to(x[0], (4, 3)),
    ],
)
def test_views_are_arrays_of_their_own_in_jax(change):
    x = change(jnp.arange(6.0).reshape(2, 3))
    assert tb.to_torch(x).tolist() == tb.to_numpy(x).tolist() == x.tolist()


def test_the_result_outlives_the_source():
    x = jnp.arange(1000.0)
    a, t = tb.to_numpy(x), tb.to_torch(x, share_readonly=True)
    del x
    gc.collect()
    others = [jnp.zeros(1000) for _ in range(20)]
    assert a.sum() == t.sum() == 999 * 500
    assert len(others) == 20


def test_a_list_of_jax_arrays_is_stacked():
    assert tb.to_torch([jnp.arange(3), jnp.arange(3)]).tolist() == [[0, 1, 2]] * 2


def test_a_jax_array_fills_an_out():
    x = jnp.arange(3.0, dtype=jnp.bfloat16)
    assert tb.to_torch(x, out=torch.zeros(3)).tolist() == [0, 1, 2]
    assert tb.to_numpy(x, out=np.zeros(3)).tolist() == [0, 1, 2]


def test_what_torch_gives_jax_takes_and_back():
    t = torch.arange(6.0)
    x = jnp.from_dlpack(t)
    assert tb.to_torch(x).tolist() == t.tolist()
    assert tb.shares_memory(x, t) == (x.unsafe_buffer_pointer() == t.data_ptr())


def test_values_that_are_still_being_computed_are_waited_for():
    x = jnp.ones((600, 600))
    product = jax.jit(lambda m: (m @ m) @ m)(x)
    assert (tb.to_numpy(product) == 360000).all()


REFUSED = {
    "int4": (lambda: ones("int4"), tb.ProducerError, "S4"),
    "float4": (lambda: ones("float4_e2m1fn"), tb.UnsupportedArrayError, "4 bits"),
    "a random key": (lambda: jax.random.key(0), tb.UnsupportedArrayError, "key_data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused_in_the_words_of_jax(name):
    make, error, words = REFUSED[name]
    for convert, call in ((tb.to_numpy, "to_numpy"), (tb.to_torch, "to_torch")):
        with pytest.raises(error, match=words) as caught:
            convert(make())
        assert str(caught.value).startswith(f"{call}: ")


def test_a_deleted_array_is_refused():
    x = ones("float32")
    x.delete()
    with pytest.raises(tb.ProducerError, match=r"ArrayImpl failed to export .*: it was deleted, or its memory donated"):
        tb.to_numpy(x)


def test_a_tracer_is_refused_with_the_words_of_jax():
    refused = []

    def function(x):
        for convert in (tb.to_numpy, tb.to_torch):
            try:
                convert(x)
            except tb.UnsupportedArrayError as error:
                refused.append(str(error))
        return x

    jax.jit(function)(jnp.ones(3))
    jax.grad(lambda x: function(x).sum())(jnp.ones(3))
    assert len(refused) == 4
    assert all("trac" in text.lower() for text in refused)


def test_float8_that_torch_lacks_is_refused_with_a_dtype_that_works():
    x = ones("float8_e3m4")
    with pytest.raises(tb.UnsupportedArrayError, match='Use dtype="float16"'):
        tb.to_torch(x)
    assert tb.to_torch(x, dtype="float16").tolist() == [[1] * 3] * 2
