"""What holds for all tests."""

from hypothesis import settings

# A machine that others use too is no reason for a test to fail.
settings.register_profile("pellucid", deadline=None)
settings.load_profile("pellucid")
