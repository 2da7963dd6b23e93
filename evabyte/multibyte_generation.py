class MultibyteGenerationMixin:
    pass
