"""Fails at import, as after an incomplete upgrade of what it depends on."""

import nanoengine_library_that_is_not_there  # noqa: F401
