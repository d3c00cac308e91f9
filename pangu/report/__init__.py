"""What a run leaves for people to look at: plots, a page, a summary. No torch in here."""


class ReportError(Exception):
    """A folder that cannot be reported on; the message says why, in one sentence."""
