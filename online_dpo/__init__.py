"""Multi-round DPO with fresh on-policy pairs: sample, judge, pair, train, measure, repeat."""

__version__ = "0.1.0"
