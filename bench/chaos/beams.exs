defmodule Chaos.Beams do
  # An application that keeps its requests in a journal, and whose BEAM is killed over and over: what it was told once,
  # is true in all its lives.

  import StarweaveImage.TestOSProcess, only: [await: 2]

  @host Path.expand("host.exs", __DIR__)
  @jobs 6
  # The line of its log that opens the moment, and up to how many ms later it is killed.
  @moments [
    {"beam", 6_000},
    {"acked", 100},
    {"sidecar", 5_000},
    {"drawn", 300},
    {"told", 200},
    {"drawn", 50},
    {"over", 50}
  ]

  def run(%{full?: full?, minutes: minutes}) do
    lives = if full?, do: 100, else: 5
    ends = Chaos.now() + 60_000 * (minutes || 1_440)
    folder = Path.join(Chaos.folder(), "beams")
    File.mkdir_p!(folder)

    deaths =
      for life <- 1..lives, Chaos.now() < ends do
        moment = Enum.at(@moments, rem(life, length(@moments)))
        Map.put(live(folder, life, moment), :moment, elem(moment, 0))
      end

    # The last one is not killed: all that was acknowledged comes to its end.
    {_beam, mark} = start(folder, "last", 0)
    over? = await(fn -> said(folder, "over", "last") end, 600_000)
    orphans = Chaos.orphans(mark)
    figures(folder, deaths, over?, orphans)
  end

  defp live(folder, life, {line, spread}) do
    {beam, mark} = start(folder, life, @jobs)
    await(fn -> said(folder, line, life) end, 60_000)
    Process.sleep(:rand.uniform(spread))
    at = Chaos.now()
    Chaos.signal(beam, "KILL")
    orphans = Chaos.orphans(mark)
    %{orphans: length(orphans), ms: Chaos.now() - at}
  end

  defp start(folder, life, jobs) do
    mark = Chaos.mark()
    ebin = :starweave_image |> :code.lib_dir() |> Path.join("ebin")
    output = Path.join(folder, "output")
    # Its own standard streams: a child that gets stuck must not hold ours.
    command = ~s(exec timeout -s KILL 900 elixir -pa "$0" "$@" >>'#{output}' 2>&1 </dev/null)
    words = ["-c", command, ebin, @host, folder, Chaos.python(), "#{life}", "#{jobs}"]
    Port.open({:spawn_executable, "/bin/sh"}, [:nouse_stdio, args: words])
    await(fn -> said(folder, "beam", life) end, 60_000)
    {said(folder, "beam", life), mark}
  end

  # The rest of the first such line.
  defp said(folder, word, life) do
    prefix = "#{word} #{life}"
    Enum.find_value(lines(folder), &(String.starts_with?(&1 <> " ", prefix <> " ") && rest(&1)))
  end

  defp rest(line), do: line |> String.split() |> List.last()

  defp lines(folder) do
    case File.read(Path.join(folder, "log")) do
      {:ok, text} -> String.split(text, "\n", trim: true)
      {:error, :enoent} -> []
    end
  end

  defp figures(folder, deaths, over?, orphans) do
    lines = folder |> lines() |> Enum.map(&String.split/1) |> Enum.with_index()
    acked = for {["acked", _, id, seed], _} <- lines, into: %{}, do: {id, seed}
    told = for {[word, _, id | result], _} <- lines, word in ["told", "again"], do: {id, result}
    results = Enum.group_by(told, &elem(&1, 0), &elem(&1, 1))

    first =
      for {["told", life, id | _], at} <- Enum.reverse(lines), into: %{}, do: {id, {life, at}}

    # The queue of a later life has it to do, or a sidecar draws it.
    twice =
      for {[word, life, id], at} <- lines,
          word in ["begun", "drawn"],
          {told_in, told_at} <- [first[id]],
          at > told_at and life != told_in,
          do: id

    ends = Enum.count(acked, fn {id, _} -> is_map_key(results, id) end)
    images = for {id, [[sum, seed] | _]} <- results, sum != "error", do: {id, sum, seed}
    same = Enum.count(results, fn {_, results} -> length(Enum.uniq(results)) == 1 end)
    seeds = Enum.count(images, fn {id, _, seed} -> acked[id] in [nil, seed] end)
    bytes = redrawn(images)
    unfinished = for {["beam", life, _], _} <- lines, do: life

    [
      {"BEAMs killed; lives", "#{length(deaths)}; #{length(unfinished)}", nil},
      {"killed after", Chaos.tally(Enum.map(deaths, & &1.moment)), nil},
      {"processes left 5 s after a kill, in all; longest until all were gone, ms",
       "#{Enum.sum(Enum.map(deaths, & &1.orphans))}; #{deaths |> Enum.map(& &1.ms) |> Enum.max()}",
       Enum.all?(deaths, &(&1.orphans == 0)) and orphans == []},
      {"acknowledged requests that ended", "#{ends} of #{map_size(acked)}",
       over? != nil and ends == map_size(acked)},
      {"ended with an image", "#{length(images)} of #{map_size(results)}",
       length(images) == map_size(results)},
      {"told of more than once; always the same",
       "#{Enum.count(results, fn {_, r} -> length(r) > 1 end)}; #{same} of #{map_size(results)}",
       same == map_size(results)},
      {"begun or drawn again in a later life though it was told", length(twice), twice == []},
      {"with the seed that was drawn when they were accepted", "#{seeds} of #{length(images)}",
       seeds == length(images)},
      {"with the bytes that the seed gives undisturbed", "#{bytes} of #{length(images)}",
       bytes == length(images)}
    ]
  end

  defp redrawn(images) do
    instance = Chaos.start([])

    same =
      images
      |> Task.async_stream(
        fn {id, sum, seed} ->
          opts = [
            steps: 4,
            width: 64,
            height: 64,
            reproducible: true,
            seed: String.to_integer(seed)
          ]

          {:ok, image} =
            StarweaveImage.generate(
              "a fig of #{id}",
              [instance: instance, timeout: 600_000] ++ opts
            )

          Chaos.digest(image) == sum
        end,
        max_concurrency: 8,
        timeout: :infinity
      )
      |> Enum.count(&(&1 == {:ok, true}))

    Chaos.stop(instance)
    same
  end
end
