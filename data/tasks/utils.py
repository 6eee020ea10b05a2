"What the task files of lmms-eval call."

from seats_analysis.serving.lmms import (
    SampleTask,
    by_family,
    doc_to_messages,
    doc_to_visual,
    process_results,
)
