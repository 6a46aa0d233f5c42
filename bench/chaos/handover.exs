defmodule Chaos.Handover do
  # From the kill to the image that was being made, in its parts: without a spare, and with one.

  import StarweaveImage.TestOSProcess, only: [await: 2]

  alias Chaos.Watch

  @opts [steps: 20, width: 64, height: 64]

  def run(%{full?: full?}) do
    rounds = if full?, do: 10, else: 2

    handed_over("cold", 0, rounds, 500) ++ handed_over("standby", 1, rounds, 300)
  end

  defp handed_over(name, standby, rounds, slack) do
    # With the pauses that an instance has by default: the first start after a good one is at once.
    instance = Chaos.start(standby: standby, backoff_min: 500, backoff_max: 30_000)
    for seed <- 1..2, do: {:ok, _} = draw(instance, seed)
    run = Chaos.median(for seed <- 1..5, do: elem(timed(fn -> draw(instance, seed) end), 0))
    Watch.listen()
    parts = for seed <- 1..rounds, do: part(instance, standby, seed)
    Chaos.stop(instance)

    median = fn key -> Chaos.median(Enum.map(parts, & &1[key])) end
    over = for p <- parts, do: p.total - p.restart - p.load - run

    [
      {"#{name}: kill to image, median of #{rounds}, ms", median.(:total), nil},
      {"#{name}: detect, restart, load, run (undisturbed: #{run})",
       Enum.map_join([:detect, :restart, :load, :run], ", ", &"#{median.(&1)}"), nil},
      {"#{name}: more than restart + load + one run, at most #{slack} ms", Chaos.median(over),
       {:goal, Chaos.median(over) <= slack}}
    ]
  end

  defp part(instance, standby, seed) do
    await(
      fn -> length(for s <- Watch.alive(instance), s.ready, do: s) == 1 + standby end,
      120_000
    )

    {:ok, _} = draw(instance, seed)

    active =
      Enum.find(StarweaveImage.status(instance: instance).sidecars, &(&1.role == :active)).os_pid

    Watch.flush()
    task = Task.async(fn -> draw(instance, 100 + seed) end)

    receive do
      {:telemetry, [_, _, :request, :progress], %{step: 10}, %{instance: ^instance}} -> :ok
    end

    killed = Chaos.now()
    Chaos.signal(active, "KILL")
    {:ok, image} = Task.await(task, :infinity)
    done = Chaos.now()
    %{ended: ended} = Watch.sidecar(active)
    # Without a spare the next one has to start first.
    next = Enum.find(Watch.sidecars(instance), &(&1.started >= ended))
    restart = if standby == 0, do: next.ready - ended, else: 0

    %{
      total: done - killed,
      detect: ended - killed,
      restart: restart,
      load: image.timings.load,
      run: done - ended - restart - image.timings.load
    }
  end

  defp draw(instance, seed),
    do: StarweaveImage.generate("a red apple", [instance: instance, seed: seed] ++ @opts)

  defp timed(work) do
    began = Chaos.now()
    result = work.()
    {Chaos.now() - began, result}
  end
end
