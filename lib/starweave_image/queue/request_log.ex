defmodule StarweaveImage.Queue.RequestLog do
  @moduledoc false
  # What the application is told about requests: telemetry events, and one log line for each request that ends, with
  # `request_id` in its metadata. Prompts are left out: logs are kept long, and read by others than the user.
  #
  # A module of its own so that it has a level of its own:
  # `Logger.put_module_level(StarweaveImage.Queue.RequestLog, :warning)` silences the lines.

  require Logger

  alias StarweaveImage.{Error, Request, Result, Telemetry}
  alias StarweaveImage.Queue.Job

  @doc "A request was accepted."
  @spec began(atom, Request.t()) :: :ok
  def began(instance, request) do
    Telemetry.execute([:request, :start], %{system_time: System.system_time()}, %{
      instance: instance,
      id: request.id,
      model: request.model,
      user_id: request.user_id,
      priority: request.priority
    })
  end

  @doc "A request was refused, with so many requests and bytes in the queue."
  @spec rejected(atom, Request.t(), Error.t(), map) :: :ok
  def rejected(instance, request, error, held) do
    facts = %{instance: instance, id: request.id, kind: error.kind}
    Telemetry.execute([:queue, :rejected], held, facts)
  end

  @doc "A running request made progress."
  @spec progressed(atom, String.t(), map) :: :ok
  def progressed(instance, id, event) do
    facts = %{instance: instance, id: id, phase: event.phase, image: event.image}
    Telemetry.execute([:request, :progress], Map.take(event, [:step, :steps]), facts)
  end

  @doc "A request will run again, after so many attempts, for a reason of `Schedule.return/4`."
  @spec again(atom, String.t(), non_neg_integer, atom) :: :ok
  def again(instance, id, attempts, reason) do
    facts = %{instance: instance, id: id, reason: reason}
    Telemetry.execute([:request, :again], %{attempts: attempts}, facts)
  end

  @doc """
  A request has ended at `now`, after so many attempts. `model` is the one that would have run it, if none was named
  yet; `memory` is the last heartbeat of the sidecar that worked on it, if one did.
  """
  @spec ended(atom, Job.t(), Job.result(), map) :: :ok
  def ended(instance, %Job{request: request} = job, result, facts) do
    {images, outcome} =
      case result do
        {:ok, images} -> {images, :ok}
        {:error, error} -> {[], error.kind}
      end

    waited = (job.dispatched_at || facts.now) - job.submitted_at
    total = facts.now - job.submitted_at
    model = (job.accepted && job.accepted.model) || facts.model

    Logger.info(
      fn ->
        times = [queue_ms: waited, total_ms: total, attempts: facts.attempts]
        line(job, outcome, model, times ++ memory(facts.memory))
      end,
      request_id: request.id
    )

    Telemetry.execute(
      [:request, :stop],
      %{
        duration: native(total),
        queue_duration: native(waited),
        bytes: Enum.sum(Enum.map(images, &byte_size(Result.data(&1)))),
        images: length(images)
      },
      %{
        instance: instance,
        id: request.id,
        model: model,
        result: outcome,
        attempts: facts.attempts
      }
    )
  end

  defp line(%{request: request} = job, outcome, model, facts) do
    steps = if job.accepted, do: job.accepted.steps, else: request.steps
    told = [model: model, steps: steps, images: request.num_images] ++ facts
    pairs = for {name, value} <- told, value != nil, do: " #{name}=#{value}"
    end_ = if outcome == :ok, do: " done", else: " failed kind=#{outcome}"
    IO.iodata_to_binary(["image request ", request.id, end_ | pairs])
  end

  defp memory(nil), do: []

  defp memory(heartbeat) do
    device = heartbeat[:device_memory]
    [rss_mb: mb(heartbeat[:rss]), device_mb: device && mb(device.used)]
  end

  defp mb(nil), do: nil
  defp mb(bytes), do: div(bytes, 1_000_000)

  defp native(ms), do: System.convert_time_unit(ms, :millisecond, :native)
end
