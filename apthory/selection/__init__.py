"""Which layer to prompt: scores of all sites by one backward pass, and a search on a budget."""

from apthory.selection.scores import DEFAULT, SCORES, SECOND_ORDER, current_name, rank_sites
from apthory.selection.search import Cost, Search, find_site, site_costs

__all__ = [
    "rank_sites",
    "SCORES",
    "SECOND_ORDER",
    "DEFAULT",
    "current_name",
    "find_site",
    "Search",
    "Cost",
    "site_costs",
]
