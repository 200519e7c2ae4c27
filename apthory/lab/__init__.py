"""What turns computations into results: records, intervals, figures, claims and notebooks. It knows no backbones."""
