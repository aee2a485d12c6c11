"""The operator's hand: an API of its own, on its own port and with its own key, over one running gateway."""

from penstock.live.admin.server import Admin

__all__ = ["Admin"]
