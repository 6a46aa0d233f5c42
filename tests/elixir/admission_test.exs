defmodule StarweaveImage.AdmissionTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Admission, Fleet, Job, Schedule, Verdict}

  @config [
    journal: "a folder",
    rate_limit: {2, 1_000},
    max_queue: 1,
    max_queue_bytes: 100,
    quarantine: 60_000,
    max_attempts: 3,
    max_retries: 1
  ]

  defp request(options \\ []) do
    {:ok, request} = Request.new("a fig", Keyword.merge([id: "a", seed: 1], options))
    request
  end

  defp facts(changes \\ []) do
    layout = [%{index: 1, kind: [], role: :active}]

    Map.merge(
      %{
        fleet: Fleet.new(true, layout),
        verdict: Verdict.new(@config),
        schedule: Schedule.new(@config),
        now: 0
      },
      Map.new(changes)
    )
  end

  defp full, do: Schedule.push(Schedule.new(@config), "b", :waiting, bytes: 5)

  defp decide(request, options \\ []) do
    {known, options} = Keyword.pop(options, :known)
    {owned?, options} = Keyword.pop(options, :owned?, false)
    {admission, options} = Keyword.pop(options, :admission, Admission.new(@config))
    Admission.decide(admission, request, owned?, known, facts(options))
  end

  defp job(request, fields \\ []), do: struct!(%Job{request: request}, fields)
  defp failed(request), do: Job.ended(job(request, result: {:error, Error.new(:timeout, "late")}))

  test "a known id is the same request, without a look at anything else" do
    down = Fleet.ended(facts().fleet, 1, :down, "no Python")
    options = [schedule: full(), fleet: down, known: job(request())]
    assert decide(request(), options) == :join
    done = Job.ended(job(request(), result: {:ok, []}))
    assert decide(request(), [known: done] ++ options) == :join
    stored = Job.ended(job(request(), result: {:stored, :ok}))
    assert decide(request(), [known: stored] ++ options) == :join
  end

  test "a known id with other content, or of another user, is refused" do
    for other <- [request(steps: 2), request(seed: 2), request(user_id: "ann")] do
      assert {:error, %Error{kind: :invalid_request, details: details}} =
               decide(other, known: job(request()))

      assert details == %{field: :id, conflict: true}
    end
  end

  test "what has failed may be asked for again, as something else too, if it is taken in" do
    assert {:take_in, _} = decide(request(), known: failed(request()))
    assert {:take_in, _} = decide(request(steps: 2), known: failed(request()))
    stored = Job.ended(job(request(), result: {:stored, :error}))
    assert {:take_in, _} = decide(request(), known: stored)

    assert {:error, %{kind: :overloaded}} =
             decide(request(), known: failed(request()), schedule: full())
  end

  test "durable is for submitted requests of an instance with a journal" do
    assert {:take_in, _} = decide(request(durable: true))

    assert {:error, %{kind: :invalid_request, details: %{field: :durable}}} =
             decide(request(durable: true), owned?: true)

    without = Admission.new(Keyword.delete(@config, :journal))

    assert {:error, %{kind: :invalid_request, details: %{field: :durable}}} =
             decide(request(durable: true), admission: without)

    assert {:take_in, _} = decide(request(), admission: without, owned?: true)
  end

  test "an instance that is down or disabled says so" do
    down = Fleet.ended(facts().fleet, 1, :down, "there is no Python")
    assert {:error, %{kind: :unavailable, message: message}} = decide(request(), fleet: down)
    assert message == "image generation is not available: there is no Python"
    assert Fleet.closed(down).message == message
    assert {:error, %{kind: :disabled}} = decide(request(), fleet: Fleet.new(false, []))
    assert Fleet.closed(facts().fleet) == nil
  end

  test "a full queue and a rate say when to come again, and who is refused costs no token" do
    assert {:error, %{kind: :overloaded, details: %{retry_after_ms: ms}}} =
             decide(request(), schedule: full())

    assert ms >= 100

    admission = Admission.new(@config)
    # Not counted: it finds no room.
    {:error, _} = decide(request(), admission: admission, schedule: full())

    admission =
      for _ <- 1..2, reduce: admission do
        admission ->
          {:take_in, admission} = decide(request(), admission: admission)
          admission
      end

    assert {:error, %{kind: :rate_limited, details: %{retry_after_ms: 500}} = error} =
             decide(request(), admission: admission)

    assert error.message == "too many requests: try again in 0.6 s"
    assert {:take_in, _} = decide(request(), admission: admission, now: 500)
  end
end
