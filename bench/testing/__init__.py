"""Tests that a method of any package runs on itself, and the tiny checkpoints and tasks that they run on.

In the tests of a package that registers a method ``mine`` in the entry-point group ``bench.methods``::

    from bench.testing import MethodConformance

    class TestMine(MethodConformance):
        method = "mine"
        options = {"warmup_epochs": 0}     # whatever makes it quick

Without a test file, and for every method that is installed, each as a class of its own::

    pytest --pyargs bench.testing
    pytest --pyargs bench.testing.test_registered::TestMine
"""

try:
    import pytest
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "bench.testing needs pytest, which bench itself does without: pip install pytest"
    ) from None

pytest.register_assert_rewrite("bench.testing.conformance")

from bench.testing.conformance import MethodConformance  # noqa: E402

__all__ = ["MethodConformance"]
