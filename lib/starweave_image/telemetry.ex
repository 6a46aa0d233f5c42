defmodule StarweaveImage.Telemetry do
  @moduledoc """
  Telemetry events, emitted through `:telemetry` when the host application has it.

  Durations are in native time units (`System.convert_time_unit/3`). Every event's metadata has
  `instance`, the name of the running instance.

  | Event | Measurements | Metadata |
  |---|---|---|
  | `[:starweave, :image, :request, :start]` | `system_time` | `id`, `model`, `user_id`, `priority` |
  | `[:starweave, :image, :request, :stop]` | `duration`, `queue_duration`, `bytes`, `images` | `id`, `model`, `result`, `attempts` |
  | `[:starweave, :image, :request, :again]` | `attempts` | `id`, `reason`, below |
  | `[:starweave, :image, :request, :progress]` | `step`, `steps` | `id`, `phase`, `image` |
  | `[:starweave, :image, :queue, :rejected]` | `queued`, `bytes` | `id`, `kind` |
  | `[:starweave, :image, :journal, :damaged]` | `records`, `images`: how many are damaged or missing | |
  | `[:starweave, :image, :sidecar, :start]` | `system_time` | `index`, `generation`, `os_pid` |
  | `[:starweave, :image, :sidecar, :ready]` | `duration` | `index`, `generation`, `os_pid`, `device`, `dtype` |
  | `[:starweave, :image, :sidecar, :heartbeat]` | `rss`, `running`, `grant` | `index`, `generation`, `phase` |
  | `[:starweave, :image, :sidecar, :stop]` | `duration` | `index`, `generation`, `os_pid`, `reason` |

  `result` is `:ok` or the kind of the error. A request goes back to the queue because its sidecar `:died` or was
  `:stopped` in order, because it `:yielded` to an interactive request, or because it `:failed` in a way that may pass.

      :telemetry.attach("log", [:starweave, :image, :request, :stop], fn _, m, meta, _ ->
        IO.inspect({meta.result, System.convert_time_unit(m.duration, :native, :millisecond)})
      end, nil)
  """

  @doc false
  @spec execute([atom], map, map) :: :ok
  def execute(event, measurements, metadata) do
    # `apply/3`, since a host without :telemetry must compile this without a warning. `function_exported?/3` loads no
    # module: a host that has attached no handler may not have loaded it, and a search of the code path would cost each
    # event.
    if function_exported?(:telemetry, :execute, 3) do
      apply(:telemetry, :execute, [[:starweave, :image | event], measurements, metadata])
    end

    :ok
  end
end
