defmodule StarweaveImage.Queue.RequestLog do
  @moduledoc false
  # One line in the application's log for each request that ends, well or not, with `request_id` in its metadata. What was
  # asked for is not in it: logs are kept long, and read by others than the user.
  #
  # A module of its own so that it has a level of its own:
  # `Logger.put_module_level(StarweaveImage.Queue.RequestLog, :warning)` silences it.

  require Logger

  alias StarweaveImage.Queue.Job

  @doc "`outcome` is `:ok` or the error's kind; `memory` is the last heartbeat of the sidecar that worked on it, where one did."
  @spec ended(Job.t(), atom, keyword) :: :ok
  def ended(%Job{request: request} = job, outcome, facts) do
    id = request.id
    Logger.info(fn -> line(job, outcome, facts) end, request_id: id)
  end

  defp line(%{request: request} = job, outcome, facts) do
    {memory, facts} = Keyword.pop(facts, :memory)
    {[model: model], times} = Keyword.split(facts, [:model])
    steps = if job.accepted, do: job.accepted.steps, else: request.steps
    told = [model: model, steps: steps, images: request.num_images] ++ times ++ memory(memory)
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
end
