"""Any torch module as a model file: an adapter for its conventions, and the checks it must pass before the export."""
