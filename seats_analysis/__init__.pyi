# The face of the package. `import seats_analysis as sa` offers these names, each loaded when it is
# first used: one list for the interpreter, for tab completion and for editors.
from .storage.schemas import load_flow as load_flow
from .storage.schemas import load_profile as load_profile
from .inputs.media import Clip as Clip
from .inputs.media import decode_clip as decode_clip
from .inputs.samples import Sample as Sample
from .inputs.questions import read_samples as read_samples
from .inputs.questions import load_benchmark as load_benchmark
from .models.encode import encode as encode
from .models.families import adapter_for as adapter_for
from .models.families import families as families
from .testbed.load import load_testbed as load_testbed
from .testbed.load import testbed_samples as testbed_samples
from .probing.selectors import all_but_sinks as all_but_sinks
from .probing.selectors import random_fraction as random_fraction
from .probing.selectors import time_window as time_window
from .probing.run import probe_dependency as probe_dependency
from .probing.run import probe_to_file as probe_to_file
from .probing.flow import media_lens as media_lens
from .probing.flow import trace_flow as trace_flow
from .boundaries.find import Boundaries as Boundaries
from .boundaries.find import find_boundaries as find_boundaries
from .boundaries.flow import explain_flow as explain_flow
from .boundaries.flow import flow_table as flow_table
from .boundaries.report import boundary_table as boundary_table
from .boundaries.report import explain as explain

from .schedules.schedule import Schedule as Schedule
from .schedules.cost import prefill_flops as prefill_flops
from .schedules.cost import probe_flops as probe_flops
from .pruning.select import topk_in_groups as topk_in_groups
from .pruning.base import Pruner as Pruner
from .pruning.cache import follow_up as follow_up
from .pruning.session import prune as prune
from .baselines.base import Baseline as Baseline
from .baselines.registry import METHODS as METHODS
from .evaluation.load import load_model as load_model
from .evaluation.evaluate import accuracy_table as accuracy_table
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.compare import compare_methods as compare_methods
from .evaluation.compare import comparison_table as comparison_table
from .tuning.certificate import Promise as Promise
from .tuning.space import SearchSpace as SearchSpace
from .tuning.tune import tune_schedule as tune_schedule
from .tuning.check import check_schedule as check_schedule
from .plots.dependency import plot_dependency as plot_dependency
from .plots.dependency import plot_retention as plot_retention
from .plots.flow import plot_flow as plot_flow
from .plots.kept import kept_data as kept_data
from .plots.kept import plot_kept as plot_kept
from .plots.explorer import explore as explore
from .plots.analysis import analyze as analyze

tune = tune_schedule  # as the commands are called
check = check_schedule
