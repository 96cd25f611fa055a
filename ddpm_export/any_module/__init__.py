"""Any torch module as a model file: an adapter that says how it differs, and questions put to it first."""
