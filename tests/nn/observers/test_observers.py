"""Observers: the scale and zero point of torch's observers for the same data, and an error where torch is silent."""

import pytest
import torch

from quanto_hf.nn import observers
from quanto_hf.nn.observers import (
    OBSERVERS,
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    MseObserver,
    NoopObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    is_memoryless,
    observer_by_name,
)

CODES = {"whole": {}, "own": {"quant_min": 0, "quant_max": 127}, "reduced": {"reduce_range": True}}
DATA = {
    "normal": lambda: [torch.randn(8, 6) * 3 for _ in range(3)],
    "growing": lambda: [torch.randn(8, 6) * 10**i for i in range(3)],
    "positive": lambda: [torch.rand(8, 6) + 1 for _ in range(2)],
    "negative": lambda: [-torch.rand(8, 6) - 1 for _ in range(2)],
    "zeros": lambda: [torch.zeros(8, 6)],
    "constant": lambda: [torch.full((8, 6), 0.5), torch.full((8, 6), 0.5)],
    "one-value": lambda: [torch.full((1, 6), -2.0)],
    "huge": lambda: [torch.randn(8, 6) * 1e30],
    "tiny": lambda: [torch.randn(8, 6) * 1e-30],
    "outlier": lambda: [torch.cat([torch.randn(999), torch.tensor([80.0])]).reshape(10, 100)],
    "long-tail": lambda: [torch.randn(64, 64).pow(3), torch.randn(64, 64).pow(3) * 2],
}
TENSOR_SCHEMES = ("per_tensor_affine", "per_tensor_symmetric")
CHANNEL_SCHEMES = ("per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams")


def fed(observer, data):
    torch.manual_seed(1)
    for x in DATA[data]():
        assert observer(x) is x
    return observer


def assert_same(mine, theirs):
    (scale, zero), (their_scale, their_zero) = mine.calculate_qparams(), theirs.calculate_qparams()
    torch.testing.assert_close(scale, their_scale.float().view_as(scale), rtol=1e-6, atol=0)
    assert zero.shape == scale.shape
    if zero.is_floating_point():
        torch.testing.assert_close(zero, their_zero.view_as(zero), rtol=1e-6, atol=0)
    else:
        assert torch.equal(zero.long(), their_zero.long().view_as(zero))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("scheme", TENSOR_SCHEMES)
@pytest.mark.parametrize("dtype", ["quint8", "qint8"])
@pytest.mark.parametrize("name", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
def test_one_scale_for_a_tensor_is_that_of_torch(ao, name, dtype, scheme, codes):
    if (codes, scheme, dtype) == ("reduced", "per_tensor_symmetric", "quint8"):
        with pytest.raises(ValueError, match="reduce_range"):
            getattr(observers, name)(dtype=dtype, qscheme=scheme, **CODES[codes])
        return
    for data in DATA:
        theirs = getattr(ao, name)(dtype=getattr(torch, dtype), qscheme=getattr(torch, scheme), **CODES[codes])
        mine = getattr(observers, name)(dtype=dtype, qscheme=scheme, **CODES[codes])
        assert_same(fed(mine, data), fed(theirs, data))


# where the squares of values leave float32, the search ends at its first step
@pytest.mark.parametrize("data", [data for data in DATA if data not in ("huge", "tiny")])
@pytest.mark.parametrize("dtype,scheme", [("quint8", "per_tensor_affine"), ("qint8", "per_tensor_symmetric")])
def test_the_scale_of_a_histogram_is_that_of_torch(ao, dtype, scheme, data):
    args = {"bins": 512, "reduce_range": scheme == "per_tensor_affine"}
    theirs = ao.HistogramObserver(dtype=getattr(torch, dtype), qscheme=getattr(torch, scheme), **args)
    assert_same(fed(HistogramObserver(dtype=dtype, qscheme=scheme, **args), data), fed(theirs, data))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("scheme", CHANNEL_SCHEMES)
@pytest.mark.parametrize("dtype", ["quint8", "qint8", "quint4x2"])
@pytest.mark.parametrize("name", ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
def test_a_scale_for_each_channel_is_that_of_torch(ao, name, dtype, scheme, axis):
    for data in DATA:
        theirs = getattr(ao, name)(ch_axis=axis, dtype=getattr(torch, dtype), qscheme=getattr(torch, scheme))
        mine = getattr(observers, name)(ch_axis=axis, dtype=dtype, qscheme=scheme)
        assert_same(fed(mine, data), fed(theirs, data))


@pytest.mark.parametrize("seed", range(8))
def test_the_search_of_the_histogram_cuts_off_the_same_bins_as_torch(ao, seed):
    torch.manual_seed(seed)
    mine, theirs = HistogramObserver(bins=512), ao.HistogramObserver(bins=512)
    for step in range(3):
        x = torch.randn(2000) * torch.rand(1) * 10 ** float(torch.randint(-3, 3, (1,)))
        x = [x, x.pow(3), x.relu(), x.exp()][(seed + step) % 4]
        mine(x), theirs(x)
    assert torch.equal(mine.histogram, theirs.histogram)
    assert_same(mine, theirs)


def test_codes_of_a_uint8_and_symmetric_scheme_are_those_of_torch(ao):
    for codes in ({}, {"quant_min": 0, "quant_max": 127}):
        for dtype in ("uint8", "int8", "int16", "int32"):
            theirs = ao.MinMaxObserver(dtype=getattr(torch, dtype), qscheme=torch.per_tensor_symmetric, **codes)
            assert_same(fed(MinMaxObserver(getattr(torch, dtype), "per_tensor_symmetric", **codes), "normal"),
                        fed(theirs, "normal"))  # fmt: skip


def test_the_default_observers_are_those_of_torch(ao):
    for name in ("MinMaxObserver", "PerChannelMinMaxObserver", "MovingAverageMinMaxObserver"):
        assert_same(fed(getattr(observers, name)(), "normal"), fed(getattr(ao, name)(), "normal"))
        args = {"eps": 2**-12}
        assert_same(fed(getattr(observers, name)(**args), "tiny"), fed(getattr(ao, name)(**args), "tiny"))


def test_dtypes_and_schemes_may_be_torch_objects_or_names():
    by_object = MinMaxObserver(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
    assert (by_object.dtype, by_object.qscheme) == ("int8", "per_tensor_symmetric")
    if hasattr(torch, "qint8"):
        assert MinMaxObserver(dtype=torch.qint8).dtype == "qint8"
    with pytest.raises(ValueError, match="int3"):
        MinMaxObserver(dtype="int3")
    with pytest.raises(TypeError, match="8"):
        MinMaxObserver(dtype=8)
    with pytest.raises(ValueError, match="per_row"):
        MinMaxObserver(qscheme="per_row")
    with pytest.raises(ValueError, match="per_channel_affine"):
        MinMaxObserver(qscheme="per_channel_affine")


@pytest.mark.parametrize("low,high", [(1, 5), (-5, -1), (0, 0), (0, 256), (None, 5)])
def test_codes_that_are_no_range_are_refused(low, high):
    with pytest.raises(ValueError):
        MinMaxObserver(quant_min=low, quant_max=high)


@pytest.mark.parametrize("name", [name for name, cls in OBSERVERS.items() if cls is not FixedQParamsObserver])
def test_an_observer_that_has_seen_nothing_has_no_scale(name):
    observer = observer_by_name(name)()
    with pytest.raises(RuntimeError):
        observer.calculate_qparams()
    observer(torch.empty(0, 4))
    with pytest.raises(RuntimeError):
        observer.calculate_qparams()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [MinMaxObserver, PerChannelMinMaxObserver])
def test_values_that_are_no_numbers_are_an_error(cls, bad):
    observer = cls()
    observer(torch.tensor([[1.0, bad]]))
    with pytest.raises(RuntimeError, match=r"NaN|no values"):
        observer.calculate_qparams()


def test_infinite_values_are_left_out_of_a_histogram():
    with_inf, without = HistogramObserver(), HistogramObserver()
    x = torch.randn(100)
    with_inf(torch.cat([x, torch.tensor([float("inf"), -float("inf")])]))
    without(x)
    assert torch.equal(with_inf.calculate_qparams()[0], without.calculate_qparams()[0])


RANGES = {
    "minmax": MinMaxObserver, "memoryless": MinMaxObserver.with_args(memoryless=True),
    "average": MovingAverageMinMaxObserver, "channel": PerChannelMinMaxObserver,
    "average-channel": MovingAveragePerChannelMinMaxObserver, "histogram": HistogramObserver,
    "percentile": PercentileObserver, "mse": MseObserver,
}  # fmt: skip
every_range = pytest.mark.parametrize("make", RANGES.values(), ids=RANGES)


@every_range
def test_what_was_seen_is_in_the_state_dict(make):
    observer, fresh = fed(make(), "normal"), make()
    fresh.load_state_dict(observer.state_dict())
    for mine, theirs in zip(fresh.calculate_qparams(), observer.calculate_qparams(), strict=True):
        assert torch.equal(mine, theirs)


@every_range
def test_reset_forgets_all(make):
    observer = fed(make(), "growing")
    observer.reset()
    with pytest.raises(RuntimeError, match="no values"):
        observer.calculate_qparams()
    for mine, fresh in zip(
        fed(observer, "normal").calculate_qparams(), fed(make(), "normal").calculate_qparams(), strict=True
    ):
        assert torch.equal(mine, fresh)


@every_range
def test_the_range_stays_float32_in_a_bfloat16_model_and_takes_bfloat16_tensors(make):
    observer = make().bfloat16()
    observer(torch.randn(8, 6).bfloat16())
    assert {buffer.dtype for buffer in observer.buffers()} == {torch.float32}
    assert observer.calculate_qparams()[0].dtype == torch.float32


@every_range
def test_no_gradient_is_kept(make):
    observer, x = make(), torch.randn(8, 6, requires_grad=True)
    assert observer(x * 1).requires_grad
    assert not observer.calculate_qparams()[0].requires_grad


@every_range
def test_every_observer_can_be_memoryless(make):
    observer = make(memoryless=True)
    for x in DATA["growing"]():
        observer(x)
    once = make()
    once(x)
    assert torch.equal(observer.calculate_qparams()[0], once.calculate_qparams()[0]) and is_memoryless(observer)


def test_memoryless_observers_know_the_last_tensor_only():
    for observer in (MinMaxObserver(memoryless=True), MovingAverageMinMaxObserver(averaging_constant=1)):
        observer(torch.tensor([-9.0, 9.0]))
        observer(torch.tensor([0.0, 1.0]))
        assert float(observer.max_val) == 1 and float(observer.min_val) == 0
        assert is_memoryless(observer)
    assert not is_memoryless(MinMaxObserver()) and not is_memoryless(PlaceholderObserver())
    with pytest.raises(ValueError, match="averaging_constant"):
        MovingAverageMinMaxObserver(is_dynamic=True)


def test_percentile_cuts_off_a_part_of_the_values():
    x = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([50.0, -70.0])])
    low, high = fed_one(PercentileObserver(99, bins=100_000), x).search()
    assert abs(float(low) + 0.98) < 0.01 and abs(float(high) - 0.98) < 0.01
    everything = fed_one(PercentileObserver(100), x)
    assert [float(end) for end in everything.search()] == [-70, 50]
    with pytest.raises(ValueError, match="50"):
        PercentileObserver(40)


def fed_one(observer, x):
    observer(x)
    return observer


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("data", ["normal", "outlier", "long-tail", "positive"])
def test_mse_is_never_worse_than_the_whole_range(dtype, data):
    from quanto_hf.eager.grid import round_to_grid

    best, whole = MseObserver(dtype=dtype), MinMaxObserver(dtype, "per_tensor_symmetric")
    x = torch.cat([x.flatten() for x in DATA[data]()])
    errors = []
    for observer in (best, whole):
        observer(x)
        rounded = round_to_grid(x, *observer.calculate_qparams(), observer.quant_min, observer.quant_max, None, dtype)
        errors.append(float((rounded - x).square().mean()))
    # bins are coarser than values
    assert errors[0] <= errors[1] * 1.01


def test_mse_clips_where_steps_are_few():
    x = torch.randn(10_000)
    observer = fed_one(MseObserver(quant_min=-8, quant_max=7), x)
    assert float(observer.search()[1]) < 0.8 * float(x.abs().max())


def test_fixed_placeholder_noop_and_recording():
    scale, zero = FixedQParamsObserver(scale=2 / 256, zero_point=128).calculate_qparams()
    assert (scale.tolist(), zero.tolist()) == ([2 / 256], [128])
    placeholder = PlaceholderObserver(dtype=torch.float16, is_dynamic=True)
    assert (placeholder.dtype, placeholder.is_dynamic) == ("float16", True)
    x = torch.randn(2)
    assert NoopObserver()(x) is x
    recording = RecordingObserver()
    recording(x)
    x.zero_()
    assert recording.get_tensor_value()[0].abs().sum() > 0


def test_constructors_with_arguments_make_new_observers_each_time():
    make = MinMaxObserver.with_args(quant_min=0, quant_max=127).with_args(dtype="quint8")
    assert make() is not make()
    assert (make().quant_max, make(quant_max=63).quant_max) == (127, 63)
    assert make == MinMaxObserver.with_args(dtype="quint8", quant_max=127, quant_min=0)
    assert make != MinMaxObserver.with_args(quant_min=0, quant_max=127)
    device = make.with_callable_args(factory_kwargs=lambda: {"device": "meta"})
    assert device().min_val.device.type == "meta"


def test_an_unknown_observer_is_an_error():
    with pytest.raises(ValueError, match="histogram"):
        observer_by_name("nope")
