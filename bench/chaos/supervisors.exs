defmodule Chaos.Supervisors do
  # Every Erlang process of an instance is killed, one after the other and again, while requests run, in a host as it may be:
  # an instance and a client in one supervisor, beside processes that have nothing to do with them.

  import StarweaveImage.TestOSProcess, only: [await: 2]

  @requests 8
  # What these hold goes on.
  @below [:sidecars, :sidecar_keeper, :sidecar, :log_reader, :client, :client_keeper]
  # With these goes the queue, and what it has in memory is answered with one error.
  @above [:queue, :supervisor, :keeper, :host]

  def run(%{full?: full?}) do
    sums = Chaos.undisturbed(@requests)
    mark = Chaos.mark()
    times = if full?, do: 10, else: 1
    {name, application} = start()
    before = bystanders(application, name)
    done = :counters.new(1, [])

    {below, of_below} = strikes(name, @below, times, sums, done)
    {above, of_above} = strikes(name, @above, times, sums, done)

    kept = Map.take(bystanders(application, name), [:other]) == Map.take(before, [:other])
    alive? = Process.alive?(application)
    Supervisor.stop(application, :normal, 60_000)
    orphans = Chaos.orphans(mark)

    outcomes = fn outcomes -> for {outcome, _attempts} <- outcomes, do: outcome end
    late = for {part, nil} <- below ++ above, do: part
    took = for {_part, ms} <- below ++ above, ms != nil, do: ms

    [
      {"kills of #{Enum.join(@below, ", ")}", length(below), nil},
      {"requests meanwhile", Chaos.tally(outcomes.(of_below)),
       Enum.uniq(outcomes.(of_below)) == [:same]},
      {"kills of #{Enum.join(@above, ", ")}", length(above), nil},
      {"requests meanwhile", Chaos.tally(outcomes.(of_above)),
       Enum.uniq(outcomes.(of_above)) -- [:same, :unavailable] == []},
      {"not back within two minutes", inspect(late), late == []},
      {"until a picture can be drawn again",
       "#{Chaos.median(took)} ms (median), #{Enum.max(took)} ms (longest)", nil},
      {"the host's application lives, and its other processes", alive? and kept, alive? and kept},
      {"processes left behind", length(orphans), orphans == []}
    ]
  end

  defp start do
    name = Module.concat(Chaos, "I#{System.unique_integer([:positive])}")
    instance = {StarweaveImage, [name: name] ++ Chaos.options(shutdown_grace: 500)}

    client = {StarweaveImage.Client, name: Module.concat(name, "Client"), instance: name}

    host = [strategy: :one_for_one, name: Module.concat(name, "Host")]

    images = %{
      id: :images,
      type: :supervisor,
      start: {Supervisor, :start_link, [[bystander(:beside), instance, client], host]}
    }

    {:ok, application} =
      Supervisor.start_link([bystander(:other), images], strategy: :one_for_one)

    :ok = StarweaveImage.await_ready(120_000, instance: name)
    {name, application}
  end

  defp bystander(id), do: Supervisor.child_spec({Agent, fn -> id end}, id: id)

  defp bystanders(application, name) do
    for supervisor <- [application, Module.concat(name, "Host")],
        {id, pid, _, _} <- Supervisor.which_children(supervisor),
        id in [:other, :beside],
        into: %{},
        do: {id, pid}
  end

  # Gives how long each took, and what became of the requests.
  defp strikes(name, parts, times, sums, done) do
    Chaos.load(name, @requests, 4, sums, done, fn ->
      for _ <- 1..times, part <- Enum.shuffle(parts) do
        enough = :counters.get(done, 1) + :rand.uniform(6)
        await(fn -> :counters.get(done, 1) >= enough end, 30_000)
        {part, strike(name, part)}
      end
    end)
  end

  defp strike(name, part) do
    await(fn -> find(name, part) != nil end, 120_000)
    pid = find(name, part)
    at = Chaos.now()
    Process.exit(pid, :kill)

    back? = fn ->
      find(name, part) not in [nil, pid] and StarweaveImage.available?(instance: name) and
        Process.whereis(Module.concat(name, "Client")) != nil
    end

    if await(back?, 120_000), do: Chaos.now() - at
  end

  defp find(name, part) do
    process(name, part)
  catch
    :exit, _ -> nil
  end

  defp process(name, :queue), do: Process.whereis(name)

  defp process(name, :client_keeper),
    do: Process.whereis(Module.concat([name, "Client", "Keeper"]))

  defp process(name, :sidecar_keeper), do: name |> process(:sidecars) |> child()
  defp process(name, :sidecar), do: name |> process(:sidecar_keeper) |> child()

  defp process(name, :log_reader) do
    owner = process(name, :sidecar)
    log = owner && :sys.get_state(owner).log
    log && log.reader
  end

  defp process(name, part),
    do: Process.whereis(Module.concat(name, part |> Atom.to_string() |> Macro.camelize()))

  defp child(nil), do: nil

  defp child(supervisor) do
    [{_, pid, _, _}] = Supervisor.which_children(supervisor)
    if is_pid(pid), do: pid
  end
end
