"""A merge that is kept: add, remove and re-weight adapters later, then merge by any method.

state = MergeState.create(["adapters/sst2", "adapters/mnli"])
state.add("adapters/squad")
state.remove("sst2")
state.save("state")
MergeState.load("state").merged("ties", density=0.3, output="merged")

exact        every member's updates in shared bases: whatever came and went, a merge is that of the members there
             are, by every method, and their folders are not needed any more
statistics   the same, and what a method such as RegMean or Fisher knows of each member's data
truncated    the weighted sum alone, at a fixed rank, so that its size does not grow with the number of members;
             its error is tracked and reported
"""

from moa.merging.exact_state import ExactState
from moa.merging.merge_state import MergeState
from moa.merging.statistics_state import StatisticsState
from moa.merging.truncated_state import TruncatedState

__all__ = ["ExactState", "MergeState", "StatisticsState", "TruncatedState"]
