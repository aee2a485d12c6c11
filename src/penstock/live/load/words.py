"""Two hundred short words that common vocabularies hold as one token each, with the space before them."""

from __future__ import annotations

_TEXT = (
    "the of and to in is it you that he was for on are with as his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she many "
    "some so these would other into has more her two like him see time could no make than first been its who now "
    "people my made over did down only way find use may water long little very after words called just where most "
    "know get through back much go good new write our me man too any day same right look think also around another "
    "came come work three word must because does part even place well such here take why help put years different "
    "away again off went old number great tell men say small every found still between name should home big give "
    "air line set own under read last never us left end along while might next sound below saw something thought "
    "both few those always show large often together asked house world going want school important until form food "
    "keep children feet "
)

WORDS = _TEXT.split()
"""In the order of how often they occur in English (the head of any frequency list)."""
