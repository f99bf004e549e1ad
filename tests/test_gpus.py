import pytest

from nanogpt_lit.runtime.gpus import peak_flops

# Names as torch.cuda.get_device_name() gives them; peaks in TFLOP/s, dense, from NVIDIA's data sheets and whitepapers.
KNOWN = {
    "NVIDIA GeForce RTX 2050": (6.05, 12.1),
    "NVIDIA GeForce RTX 3050 Laptop GPU": (7.13, 14.3),
    "NVIDIA GeForce RTX 4050 Laptop GPU": (12.1, 24.3),
    "NVIDIA GeForce RTX 4060 Laptop GPU": (14.6, 29.1),
    "NVIDIA GeForce GTX 1650": (2.98, 5.97),
    "Tesla T4": (8.1, 65),
    "NVIDIA A100-SXM4-40GB": (19.5, 312),
    "NVIDIA H100 80GB HBM3": (67, 989),
}


@pytest.mark.parametrize("name", KNOWN)
def test_peaks_are_the_published_dense_ones(name):
    fp32, fp16 = KNOWN[name]
    assert peak_flops(name, "32-true") / 1e12 == pytest.approx(fp32, rel=0.01)
    assert peak_flops(name, "16-mixed") / 1e12 == pytest.approx(fp16, rel=0.01)


@pytest.mark.parametrize(
    "name", ["AMD EPYC", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA GeForce GTX 1650 Ti", "NVIDIA H100 NVL"]
)
def test_a_card_that_only_resembles_a_known_one_has_no_peak(name):
    assert peak_flops(name, "16-mixed") is None


def test_a_format_that_the_card_lacks_has_no_peak():
    assert peak_flops("Tesla T4", "bf16-mixed") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB", "64-true") is None


def test_tf32_counts_only_where_it_is_allowed():
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32-true", allow_tf32=True) == 156e12
