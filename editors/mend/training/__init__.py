"""How an editor is trained.

recipe       from data files to a checkpoint folder
trainer      the run: steps, validation, saving, resuming
objective    what an editor is trained for: the loss of one micro-batch
corpus       encoded examples, from which batches are drawn;  hidden: their states below the edited blocks
samples      texts of the base model's own;  passages: edits made from plain text
processes    what several processes that train one editor do together
config       every option;  journal: curves, plot and TensorBoard
"""
