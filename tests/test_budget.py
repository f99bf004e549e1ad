import pytest

from nanogpt_lit.plan.budget import Budget, choose_budget, context_mib, gpu_named, parse_mib
from nanogpt_lit.runtime.gpus import GPUS

RTX2050 = gpu_named("rtx2050")


@pytest.mark.parametrize(
    ("text", "mib"),
    [("4GiB", 4096), ("4GB", 4096), ("4 gb", 4096), ("4g", 4096), ("3.5GiB", 3584), ("3200MiB", 3200), ("3200", 3200)],
)
def test_memory_is_written_as_people_write_it(text, mib):
    assert parse_mib("--vram", text) == mib


@pytest.mark.parametrize("text", ["", "four", "4TB", "-4GiB", "0", "4 GiB or so"])
def test_other_spellings_are_refused_with_one_that_works(text):
    with pytest.raises(ValueError, match=r"--vram=.*4GiB"):
        parse_mib("--vram", text)


@pytest.mark.parametrize("name", ["rtx2050", "RTX 2050", "NVIDIA GeForce RTX 2050", "rtx-2050"])
def test_a_card_is_known_in_any_spelling(name):
    assert gpu_named(name) is RTX2050


def test_an_unknown_card_lists_the_known():
    with pytest.raises(ValueError, match="--gpu=voodoo2") as error:
        gpu_named("voodoo2")
    assert all(card.name in str(error.value) for card in GPUS)


# What may be reserved on a 4 GB laptop card, from what users of such cards report.
@pytest.mark.parametrize(
    ("system", "desktop_on_gpu", "usable_mib"),
    [
        (None, False, 3200),
        ("linux", False, 3500),
        ("linux", True, 2700),
        ("windows", False, 3400),
        ("windows", True, 3200),
    ],
)
def test_what_is_usable_of_4_gb(system, desktop_on_gpu, usable_mib):
    assert Budget(RTX2050, system, desktop_on_gpu).usable_mib == pytest.approx(usable_mib, abs=10)


def test_the_context_grows_with_the_card_as_measured():
    assert context_mib(16) == 70  # RTX A500
    assert context_mib(142) == 426  # RTX 6000 Ada


def test_what_the_user_measured_counts():
    assert choose_budget("rtx2050", usable="2.5GiB").usable_mib == 2560


def test_another_card_is_named_by_its_memory():
    assert choose_budget(vram="6GiB").usable_mib == choose_budget("rtx2050").usable_mib + 2048


def test_a_card_without_room_is_refused():
    with pytest.raises(ValueError, match="--vram=512MiB"):
        choose_budget(vram="512MiB")


def test_a_number_without_a_unit_that_no_card_has_is_told_in_gib():
    with pytest.raises(ValueError, match="--vram=6 has no unit and would be MiB; did you mean --vram 6GiB"):
        choose_budget(vram="6")
    with pytest.raises(ValueError, match="is more memory than there is"):
        choose_budget(vram="9" * 5000 + "GiB")
