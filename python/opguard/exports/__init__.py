"""Local exports of loaded models: made at the first load, matched or made anew afterwards."""
