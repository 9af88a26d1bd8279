import pytest

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks of the upstream suites, which --strict-markers asks for."""
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' suites")
