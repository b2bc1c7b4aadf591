"""Fixtures of the tests of the hook."""

from hook_caller import criu as criu
from hook_caller import images as images
