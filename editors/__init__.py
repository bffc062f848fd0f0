"""What an edit is: models, targets, capture, editors, factors, exact state, evaluation.

Depends on torch and transformers; knows nothing of the service, of HTTP or of Redis.
"""

DEFAULT_MODEL = "smollm2-135m-instruct"
"""Name of the base model that is packaged with the project (see `editors.packaged`)."""
