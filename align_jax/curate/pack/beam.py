"""Packing units on an Apache Beam runner: DirectRunner, Dataflow, Flink, Spark.

A plain pipeline instead of the writers of TFDS: its BeamWriter orders records by hashed keys and
sends every image over the network, its NoShuffleBeamWriter leaves order and shards to chance.
Here each unit is packed by one worker with the function that local processes run, so the files are
the same bytes. Workers must see the source and the output folder under the same paths (a shared or
mounted file system), and have align_jax installed.
"""

import shlex
from collections.abc import Iterator, Sequence

from align_jax.curate.pack import unit as pack_unit
from align_jax.curate.pack.unit import Settings, Unit


def run_units(units: Sequence[Unit], settings: Settings, options: str) -> Iterator[None]:
    """Packs the units; yields once for each expected record when all are done.

    Args:
      units: to be packed.
      settings: of the run.
      options: Beam's pipeline options as on a command line, e.g. "--runner=DirectRunner".

    Raises:
      ValueError: Beam is not installed, or has no such runner or option.
      RuntimeError: the pipeline failed; finished units are kept.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError("--beam needs pip install 'align_jax[beam]'.") from error
    pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
    created = pipeline | "Units" >> beam.Create(list(units))
    spread = created | "Spread" >> beam.Reshuffle()  # else runners give one worker everything
    _ = spread | "Pack" >> beam.Map(_pack, settings)  # results are files
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # of whatever kind the runner lets through
        raise RuntimeError(f"The Beam pipeline failed: {error}") from error
    for unit in units:
        for _ in range(unit.expected):
            yield


def _pack(unit: Unit, settings: Settings) -> int:
    for _ in pack_unit.pack_unit(unit, settings):
        pass
    return unit.number
