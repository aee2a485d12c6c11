"""Settings of all tests."""

from hypothesis import settings

# A busy machine makes single examples slow, and a slow one is no failure.
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")
