defmodule StarweaveImage.Sidecar.Health do
  @moduledoc false
  # Whether a live Python process makes progress, judged by its heartbeats. Pure.

  alias StarweaveImage.Sidecar.Life

  # Work that takes this many times as long as usual counts as a hang.
  @patience_times 10

  @doc """
  Why a heartbeat shows a process that is alive but stuck, or nil.

  Each active part is checked: the device's current pass, each load, and each request that waits for neither. A request
  that waits may legitimately wait for long, and counts as stuck only if nothing else is active.
  """
  @spec stuck(map, keyword) :: String.t() | nil
  def stuck(%{running: running} = beat, config) do
    {waiting, working} = Enum.split_with(running, & &1[:waits])
    {work, loads} = {beat[:device_work], beat[:loads] || []}

    cond do
      load = Enum.find(loads, &(&1.age_ms > config[:load_timeout])) ->
        "the load of #{load.model} has taken over #{seconds(config[:load_timeout])} s"

      work && work.age_ms > work_limit(work, config) ->
        "the device has been at one pass for over #{seconds(work_limit(work, config))} s"

      request = Enum.find(working, &(&1.step_age_ms > step_limit(&1, config))) ->
        limit = seconds(step_limit(request, config))
        "request #{request.id} has not moved for over #{limit} s while #{request.phase}"

      waiting != [] and {work, loads, working} == {nil, [], []} and
          Enum.all?(waiting, &(&1.step_age_ms > config[:stall_timeout])) ->
        "all requests have waited for over #{seconds(config[:stall_timeout])} s, and nothing is worked on"

      true ->
        nil
    end
  end

  @doc """
  Why a process whose life is in `state` has been silent for too long, and whether it hangs (`:stalls`) or did not start
  in time (`:fails`); or nil. `clocks`, all in ms: `:now`, the last sign of life (`:heard_at`), the time by which it
  must be ready (`:start_by`), and since when each of its requests should be in its heartbeats (`:asked_at`).
  """
  @spec overdue(Life.state(), map, keyword) :: {:stalls | :fails, String.t()} | nil
  def overdue(state, %{now: now} = clocks, config) do
    silent = now - clocks.heard_at

    cond do
      # The import of a large library may hold the interpreter for long, and the heartbeat with it.
      state in [:started, :ready] and silent > config[:heartbeat_timeout] ->
        {:stalls, "no heartbeat for #{silent} ms"}

      state in [:started, :greeted] and now > clocks.start_by ->
        {:fails, "it was not ready after #{config[:start_timeout]} ms"}

      Enum.any?(clocks.asked_at, &(now - &1 > config[:heartbeat_timeout])) ->
        {:stalls, "it does not work on what it was asked"}

      true ->
        nil
    end
  end

  @doc """
  Why a process must be ended because requests that were told to stop still run, or nil.

  `told` maps the ids of these requests to when they were told. A cancel cannot interrupt a decoder, an encoder, a
  tokenizer or a scheduler that does not return. The device and loads have limits of their own, so requests that wait
  for those do not count.
  """
  @spec outstays(map, %{String.t() => integer}, integer, keyword) :: String.t() | nil
  def outstays(%{running: running}, told, now, config) do
    limit = config[:cancel_timeout]

    # A request that was in a pass when it was told to stop could not react before that pass ended.
    overdue? = fn request, since -> min(now - since, request.step_age_ms) > limit end
    late = &(is_map_key(told, &1.id) and not (&1[:waits] || false) and overdue?.(&1, told[&1.id]))

    if request = Enum.find(running, late),
      do:
        "request #{request.id} was told to stop, and has worked on for over #{seconds(limit)} s while #{request.phase}"
  end

  defp work_limit(work, config) do
    least = if work.known, do: config[:stall_floor], else: config[:stall_timeout]
    max(least, @patience_times * work.usual_ms)
  end

  defp step_limit(%{phase: "loading"}, config), do: config[:load_timeout]

  defp step_limit(%{phase: "denoising", step_ms: known}, config) when known > 0,
    do: max(config[:stall_floor], @patience_times * known)

  defp step_limit(_request, config), do: config[:stall_timeout]

  defp seconds(ms), do: Float.round(ms / 1_000, 1)
end
