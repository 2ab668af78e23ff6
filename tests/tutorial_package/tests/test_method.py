"""The suite's own tests of what a method promises."""

from bench.testing import MethodConformance


class TestLowerLayers(MethodConformance):
    """On tiny random models of both families."""

    method = "lower_layers"
