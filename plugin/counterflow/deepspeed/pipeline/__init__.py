"""DeepSpeed's pipeline under a schedule: model chunks of a PipelineModule, the engine's steps, split backward passes."""
