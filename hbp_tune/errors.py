"""Errors that a user can mend: each message gives the value, the bound and the way out."""


class HbpError(ValueError):
    """Base of every error that hbp-tune raises about its input; the recipe prints it as one line."""


class ConfigError(HbpError):
    """A configuration value, or a combination of values, that cannot work."""


class PackingError(HbpError):
    """Samples that cannot be placed in the given groups."""


class DataError(HbpError):
    """A data set, file or row that cannot be read as training samples."""


class ResumeError(HbpError):
    """Saved progress that does not belong to this run."""


class SaveError(HbpError):
    """Progress or weights that could not be written to disk."""


class NonFiniteError(HbpError):
    """More steps than allowed whose loss or gradient is not finite."""


class OutOfMemoryError(HbpError):
    """A pack that did not fit a rank's memory."""
