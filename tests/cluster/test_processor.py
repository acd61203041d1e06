"""Which processors compute bfloat16 themselves, by what the kernel says of them."""

import pytest

from lightning_ray.cluster.processor import multiplies_bfloat16

XEON = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f {}amx_tile\nbugs\t\t: \n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}i8mm\n"


@pytest.mark.parametrize(
    ("text", "has_it"),
    [
        (XEON.format("avx512_bf16 "), True),
        (XEON.format("amx_bf16 "), True),
        (XEON.format(""), False),
        (ARM.format("bf16 "), True),
        (ARM.format(""), False),
        ("", False),
    ],
)
def test_a_processor_that_multiplies_bfloat16_is_known_by_its_flags(tmp_path, text, has_it):
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is has_it


def test_a_machine_that_says_nothing_of_its_processor_has_none(tmp_path):
    assert multiplies_bfloat16(tmp_path / "none") is False
