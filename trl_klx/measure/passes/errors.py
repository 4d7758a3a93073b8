"""What a measurement can meet: something that ends it, one model that cannot be read, one row that cannot be used."""


class MeasureError(ValueError):
    """What was asked for cannot work. The message is one sentence that names the field, value and remedy."""


class ModelError(MeasureError):
    """One model cannot be measured; the others can."""


class RowError(MeasureError):
    """One row cannot be measured; the others can. The message has the reason, without the row."""
