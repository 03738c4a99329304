"""Synthetic archives with known truth, in the layout of SSL4EO-S12 and NoLDO-S12."""

from cromss_dist.data.synthetic.archive import write_archive
from cromss_dist.data.synthetic.location import Location, synthesise
from cromss_dist.data.synthetic.report import Report
from cromss_dist.data.synthetic.settings import PLACES, Noise, SyntheticConfig

__all__ = ["PLACES", "Location", "Noise", "Report", "SyntheticConfig", "synthesise", "write_archive"]
