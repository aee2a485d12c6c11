"""Penstock: SLO-aware control of prefill/decode-disaggregated LLM serving."""

from penstock import _form

__version__ = "0.1.0"

FORM = _form.choose(__file__)
"""``"compiled"`` or ``"interpreted"``: the same source either way, see ``_form``."""
