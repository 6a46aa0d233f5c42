defmodule Chaos.Pair do
  # Two sidecars and a spare, one of them killed every 10 s: what that costs, against times in which nobody is.

  alias Chaos.Watch

  @clients 8
  @kill_ms 10_000

  def run(%{full?: full?}) do
    {rounds, ms} = if full?, do: {4, 60_000}, else: {1, 30_000}

    mark = Chaos.mark()
    instance = Chaos.start(sidecars: 2, standby: 1, preload: ["starweave/tiny"])
    for n <- 1..20, do: {:ok, _} = draw(instance, n)
    done = :counters.new(2, [])
    stop = :atomics.new(1, [])
    clients = for _ <- 1..@clients, do: Task.async(fn -> client(instance, done, stop, []) end)

    rates =
      for round <- 1..rounds do
        # Whoever comes first finds the machine as others left it: take turns in that too.
        kinds = if rem(round, 2) == 1, do: [:calm, :disturbed], else: [:disturbed, :calm]
        Map.new(kinds, &{&1, rate(&1, instance, done, ms)})
      end

    :atomics.put(stop, 1, 1)
    failed = clients |> Task.await_many(:infinity) |> Enum.concat()
    deaths = Enum.count(Watch.sidecars(instance), & &1.ended)
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)

    mean = fn kind -> Enum.sum(Enum.map(rates, & &1[kind])) / rounds end
    ratio = Float.round(mean.(:disturbed) / mean.(:calm), 2)

    [
      {"seconds of each kind; kills", "#{div(rounds * ms, 1000)}; #{deaths}", nil},
      {"requests done", :counters.get(done, 1), nil},
      {"requests failed", Chaos.tally(Enum.map(failed, & &1.kind)), failed == []},
      {"a second, undisturbed", Float.round(mean.(:calm), 2), nil},
      {"a second, one of them killed each #{div(@kill_ms, 1000)} s",
       Float.round(mean.(:disturbed), 2), nil},
      {"throughput of the undisturbed, above 0.8", ratio, {:goal, ratio > 0.8}},
      {"processes left behind", length(orphans), orphans == []}
    ]
  end

  # Requests a second until `ms` are over, killing or not.
  defp rate(kind, instance, done, ms) do
    settle(instance)
    before = :counters.get(done, 1)
    began = Chaos.now()
    killer = if kind == :disturbed, do: Task.async(fn -> kill(instance, began + ms) end)
    Process.sleep(ms)
    rate = (:counters.get(done, 1) - before) * 1_000 / (Chaos.now() - began)
    if killer, do: Task.await(killer, :infinity)
    rate
  end

  # Nothing of the time before is left to be done in this one.
  defp settle(instance) do
    all_ready = fn -> Enum.count(Watch.alive(instance), & &1.ready) == 3 end
    StarweaveImage.TestOSProcess.await(all_ready, 120_000)
  end

  defp kill(instance, ends) do
    active =
      for %{role: :active, os_pid: pid} when pid != nil <-
            StarweaveImage.status(instance: instance).sidecars,
          do: pid

    if active != [], do: Chaos.signal(Enum.random(active), "KILL")
    Process.sleep(@kill_ms)
    if Chaos.now() + 1_000 < ends, do: kill(instance, ends)
  end

  defp client(instance, done, stop, failed) do
    if :atomics.get(stop, 1) == 1 do
      failed
    else
      case draw(instance, :rand.uniform(1_000_000)) do
        {:ok, _} ->
          :counters.add(done, 1, 1)
          client(instance, done, stop, failed)

        {:error, error} ->
          Process.sleep(1_000)
          client(instance, done, stop, [error | failed])
      end
    end
  end

  defp draw(instance, seed) do
    # No two are alike: one that was given up would have its like refused for a while.
    opts = [seed: seed, steps: 8, width: 64, height: 64, timeout: 600_000]
    StarweaveImage.generate("a red apple number #{seed}", [instance: instance] ++ opts)
  end
end
