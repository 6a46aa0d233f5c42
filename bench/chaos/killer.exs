defmodule Chaos.Killer do
  # Every Python process is killed from outside each 12 s, by a clock that knows of nothing, under requests of one prompt. None of them
  # is to blame, and an instance with its default options must give none up. Where a start takes long, because others want the
  # machine too, the period is three times that: nothing is drawn by a process that never gets ready.

  alias Chaos.Watch

  @period 12_000
  @clients 8
  @prompt "a red apple in the snow"
  @opts [steps: 16, width: 64, height: 64, reproducible: true]

  def run(%{full?: full?}) do
    requests = if full?, do: 120, else: 40
    {sums, start} = undisturbed(requests)
    period = max(@period, 3 * start)

    mark = Chaos.mark()
    # The defaults, in the pauses between starts too.
    instance = Chaos.start(max_queue: 64, backoff_min: 500, backoff_max: 30_000)
    {:ok, clock} = :timer.apply_interval(period, __MODULE__, :kill, [instance])
    began = Chaos.now()
    outcomes = ask(instance, requests, sums)
    took = div(Chaos.now() - began, 1_000)
    {:ok, :cancel} = :timer.cancel(clock)
    deaths = Enum.count(Watch.sidecars(instance), & &1.ended)
    again = ask(instance, 8, sums)
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)

    same = for {:same, attempts} <- outcomes, do: attempts
    others = for {kind, _} when kind != :same <- outcomes, do: kind

    [
      {"requests of one prompt, #{@clients} at once; seconds", "#{requests}; #{took}", nil},
      {"all killed each so many ms (a start took #{start}); deaths", "#{period}; #{deaths}", nil},
      {"done with the bytes of an undisturbed run", "#{length(same)} of #{requests}",
       length(same) == requests},
      {"not done", Chaos.tally(others), others == []},
      {"of those after more than one attempt; most attempts of one",
       "#{Enum.count(same, &(&1 > 1))}; #{Enum.max(same, fn -> nil end)}", nil},
      {"asked again when nobody kills any more",
       "#{Enum.count(again, &match?({:same, 1}, &1))} of 8",
       Enum.all?(again, &match?({:same, 1}, &1))},
      {"processes left behind", length(orphans), orphans == []}
    ]
  end

  def kill(instance), do: for(s <- Watch.alive(instance), do: Chaos.signal(s.os_pid, "KILL"))

  defp undisturbed(requests) do
    instance = Chaos.start(sidecars: 2)

    starts =
      for %{ready: ready, started: started} when ready != nil <- Watch.sidecars(instance),
          do: ready - started

    sums =
      1..requests
      |> Task.async_stream(&undisturbed(instance, &1),
        max_concurrency: @clients,
        timeout: :infinity
      )
      |> Map.new(fn {:ok, sum} -> sum end)

    Chaos.stop(instance)
    {sums, Enum.max(starts)}
  end

  defp undisturbed(instance, seed) do
    {:ok, image} = draw(instance, seed)
    {seed, Chaos.digest(image)}
  end

  defp ask(instance, requests, sums) do
    1..requests
    |> Task.async_stream(
      fn seed ->
        case draw(instance, seed) do
          {:ok, image} ->
            {if(Chaos.digest(image) == sums[seed], do: :same, else: :other), image.attempts}

          {:error, error} ->
            {error.kind, 0}
        end
      end,
      max_concurrency: @clients,
      timeout: :infinity
    )
    |> Enum.map(fn {:ok, outcome} -> outcome end)
  end

  defp draw(instance, seed),
    do: StarweaveImage.generate(@prompt, [instance: instance, seed: seed] ++ @opts)
end
