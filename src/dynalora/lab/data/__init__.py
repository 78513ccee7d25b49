"""A user's data set, from wherever it lies to padded batches with the loss on the response tokens only.

Three steps, each usable alone:

1. [`load_conversations`][dynalora.lab.data.conversations.load_conversations] reads a Hub data set, a file or a
   folder and brings every row to one form, a list of chat messages;
2. [`split`][dynalora.lab.data.conversations.split] holds a part of it out, with a fixed seed and no row on both sides;
3. [`tokenize`][dynalora.evaluation.tokens.tokenize] writes each conversation in the model's own chat format and marks
   which tokens are the response.

Whatever is wrong with the data is found in step 1, before a model is loaded.
"""
