defmodule StarweaveImage.QueueModelTest do
  # Ten thousand random operations on the queue, by callers that die, time out and cancel, over two processes that work by
  # the protocol and a spare, some of which are killed. A model says what each answer may be; a failure is repeated by its seed.
  use ExUnit.Case, async: false

  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [await: 1, signal: 2]

  alias StarweaveImage.{Error, Image}

  @operations 10_000
  @moduletag timeout: 300_000

  setup do
    :telemetry.listen()

    instance =
      start("honest",
        sidecars: 2,
        standby: 1,
        capacity: 4,
        max_queue: 60,
        max_attempts: 100,
        max_results: 100_000,
        backoff_max: 100
      )

    assert await(fn ->
             Enum.count(StarweaveImage.status(instance: instance).sidecars, &(&1.state == :ready)) ==
               3
           end)

    {:ok, instance: instance}
  end

  test "holds what it promises", %{instance: instance} do
    model =
      for n <- 1..@operations,
          reduce: %{instance: instance, submitted: %{}, callers: %{}, cancelled: %{}} do
        model -> model |> operation(:rand.uniform(100), n) |> keep_pace()
      end

    # What is held ends by its time-out.
    model = collect_all(model)

    for {id, asked} <- model.submitted do
      check(
        asked,
        is_map_key(model.cancelled, id),
        StarweaveImage.await(id, 60_000, instance: instance)
      )

      assert {:error, :finished} = StarweaveImage.cancel(id, instance: instance)
    end

    # No slot, no place and no byte is left taken.
    assert await(fn ->
             match?(
               %{queued: 0, running: 0, bytes: 0},
               StarweaveImage.status(instance: instance).queue
             )
           end),
           inspect(StarweaveImage.status(instance: instance))

    # What began has ended, once, and nothing else came to this process.
    assert {same, same} = ended(instance, {0, 0})
    assert same > @operations / 4
  end

  defp operation(model, dice, n) when dice <= 40 do
    {prompt, opts} = request(model, n)
    test = self()

    pid =
      spawn(fn ->
        answer = StarweaveImage.generate(prompt, opts)
        send(test, {:answer, self(), answer, mailbox()})
      end)

    put_in(model.callers[pid], %{id: opts[:id], prompt: prompt, timeout: opts[:timeout]})
  end

  defp operation(model, dice, n) when dice <= 65 do
    {prompt, opts} = request(model, n)

    case StarweaveImage.submit(prompt, opts) do
      {:ok, id} ->
        assert id == opts[:id]
        put_in(model.submitted[id], %{prompt: prompt, timeout: opts[:timeout]})

      {:error, error} ->
        assert error.kind == :overloaded
        model
    end
  end

  # The same again is the same request, something else under its id is none.
  defp operation(model, dice, _n) when dice <= 70 do
    with_random(model.submitted, model, fn {id, %{prompt: prompt, timeout: timeout}} ->
      again = [instance: model.instance, id: id, seed: seed(id), timeout: timeout]

      case StarweaveImage.submit(prompt <> " and more", again) do
        {:error, %Error{kind: :invalid_request, details: %{conflict: true}}} ->
          model

        # It had failed, so that the id is free, and has ended without an answer for the model to check.
        {:ok, ^id} ->
          %{
            model
            | submitted:
                Map.put(model.submitted, id, %{prompt: prompt <> " and more", timeout: timeout}),
              cancelled: Map.delete(model.cancelled, id)
          }

        {:error, %Error{kind: :overloaded}} ->
          %{model | submitted: Map.delete(model.submitted, id)}
      end
    end)
  end

  defp operation(model, dice, _n) when dice <= 80 do
    with_random(model.submitted, model, fn {id, _} ->
      case StarweaveImage.cancel(id, instance: model.instance) do
        :ok -> put_in(model.cancelled[id], true)
        {:error, :finished} -> model
      end
    end)
  end

  defp operation(model, dice, _n) when dice <= 90 do
    with_random(model.callers, model, fn {pid, %{id: id}} ->
      # A caller that dies, or one whose request somebody else cancels.
      if :rand.uniform(2) == 1 do
        Process.exit(pid, :kill)
        %{model | callers: Map.delete(model.callers, pid)}
      else
        assert StarweaveImage.cancel(id, instance: model.instance) in [:ok, {:error, :not_found}]
        put_in(model.callers[pid][:cancelled?], true)
      end
    end)
  end

  defp operation(model, dice, _n) when dice <= 98 do
    assert {:error, :not_found} = StarweaveImage.cancel("nobody", instance: model.instance)
    %{queue: queue, sidecars: sidecars} = StarweaveImage.status(instance: model.instance)
    # What ran on a process that died comes back beyond the limit, and no further.
    assert queue.queued <= 60 + 8
    assert Enum.all?(sidecars, &(length(&1.running) <= max(&1.capacity, 4)))
    model
  end

  defp operation(model, _dice, n) when rem(n, 20) != 0, do: model

  defp operation(model, _dice, _n) do
    # One process that works dies.
    case for %{role: :active, os_pid: pid} <-
               StarweaveImage.status(instance: model.instance).sidecars,
             pid,
             do: pid do
      [] -> model
      pids -> pids |> Enum.random() |> kill(model)
    end
  end

  # It may have died of its own a moment ago.
  defp kill(pid, model) do
    if StarweaveImage.TestOSProcess.alive?(pid), do: signal(pid, "KILL")
    model
  end

  defp request(model, n) do
    held? = :rand.uniform(8) == 1
    id = "r#{n}"
    timeout = if held?, do: 10 + :rand.uniform(100), else: 60_000

    {if(held?, do: "hold", else: "fig #{n}"),
     [
       instance: model.instance,
       id: id,
       seed: seed(id),
       timeout: timeout,
       priority: Enum.random([:interactive, :normal, :background]),
       user_id: Enum.random([nil, "ann", "bob"])
     ]}
  end

  defp seed("r" <> n), do: String.to_integer(n)

  defp with_random(map, model, _fun) when map_size(map) == 0, do: model
  defp with_random(map, _model, fun), do: map |> Enum.random() |> fun.()

  # Most of it shall be taken in: the next operation waits where the queue is nearly full.
  defp keep_pace(model) do
    if StarweaveImage.status(instance: model.instance).queue.queued > 50,
      do:
        assert(
          await(fn -> StarweaveImage.status(instance: model.instance).queue.queued <= 40 end)
        )

    collect(model, 0)
  end

  # An answer that came in the meantime, if any.
  defp collect(model, timeout) do
    receive do
      {:answer, pid, answer, mailbox} ->
        assert mailbox == []

        case pop_in(model.callers[pid]) do
          # It was killed just after it had answered.
          {nil, model} ->
            collect(model, 0)

          {caller, model} ->
            check(caller, caller[:cancelled?], answer)
            collect(model, 0)
        end
    after
      timeout -> model
    end
  end

  defp collect_all(%{callers: callers} = model) when map_size(callers) == 0, do: model

  defp collect_all(model) do
    left = map_size(model.callers)
    model = collect(model, 60_000)
    assert map_size(model.callers) < left, "no answer for #{inspect(model.callers)}"
    collect_all(model)
  end

  defp check(%{prompt: prompt, timeout: timeout}, cancelled?, answer) do
    case answer do
      {:ok, %Image{id: id, data: data}} ->
        assert data == "#{prompt}, seed #{seed(id)}"

      {:error, %Error{kind: :timeout}} ->
        assert timeout < 1_000

      {:error, %Error{kind: :cancelled}} ->
        assert cancelled? || prompt =~ "hold"

      {:error, %Error{kind: kind}} ->
        assert kind == :overloaded
    end
  end

  defp ended(instance, {began, ended}) do
    receive do
      {:telemetry, [_, _, :request, :start], _, %{instance: ^instance}} ->
        ended(instance, {began + 1, ended})

      {:telemetry, [_, _, :request, :stop], _, %{instance: ^instance}} ->
        ended(instance, {began, ended + 1})

      {:telemetry, _, _, _} ->
        ended(instance, {began, ended})
    after
      0 ->
        assert mailbox() == []
        {began, ended}
    end
  end
end
