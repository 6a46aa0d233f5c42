defmodule StarweaveImage.HealthTest do
  # What is taken for stuck by what a heartbeat says, without processes.
  use ExUnit.Case, async: true

  alias StarweaveImage.Sidecar.Health

  @config [stall_timeout: 1_000, stall_floor: 100, load_timeout: 9_000]

  defp beat(running, more \\ %{}), do: Map.merge(%{running: running}, more)

  defp running(phase, age, more \\ %{}),
    do: Map.merge(%{id: "r1", phase: phase, step_age_ms: age, step_ms: 0, waits: false}, more)

  defp stuck(beat), do: Health.stuck(beat, @config)

  test "a pass of a known kind has ten times its time, and at least the floor" do
    pass = fn age, usual -> %{age_ms: age, usual_ms: usual, known: true} end
    assert stuck(beat([], %{device_work: nil})) == nil
    assert stuck(beat([], %{device_work: pass.(100, 0)})) == nil
    assert stuck(beat([], %{device_work: pass.(101, 10)})) =~ "over 0.1 s"
    assert stuck(beat([], %{device_work: pass.(500, 50)})) == nil
    assert stuck(beat([], %{device_work: pass.(501, 50)})) =~ "over 0.5 s"
    assert stuck(beat([], %{device_work: pass.(50_000, 5_000)})) == nil
  end

  test "one of a kind that was not seen before has the stall timeout, or ten times the estimate" do
    pass = fn age, usual -> %{age_ms: age, usual_ms: usual, known: false} end
    assert stuck(beat([], %{device_work: pass.(1_000, 0)})) == nil
    assert stuck(beat([], %{device_work: pass.(1_001, 0)})) =~ "over 1.0 s"
    assert stuck(beat([], %{device_work: pass.(4_000, 400)})) == nil
    assert stuck(beat([], %{device_work: pass.(4_001, 400)})) =~ "over 4.0 s"
  end

  test "who waits for its turn may wait for long, whoever works is judged alone" do
    waits = running("denoising", 1_000_000, %{waits: true, step_ms: 5})
    work = %{device_work: %{age_ms: 3, usual_ms: 5, known: true}}
    assert stuck(beat([waits, waits], work)) == nil
    assert stuck(beat([waits, running("encoding", 999)])) == nil
    assert stuck(beat([waits], %{loads: [%{model: "a/b", age_ms: 8_999}]})) == nil
    assert stuck(beat([waits, running("encoding", 1_001)], work)) =~ "r1 has not moved"

    assert stuck(beat([running("denoising", 0), running("decoding", 1_001)])) =~
             "while decoding"
  end

  test "a picture's further steps have ten times the longest, its first the stall timeout" do
    assert stuck(beat([running("denoising", 1_000)])) == nil
    assert stuck(beat([running("denoising", 1_001)])) =~ "over 1.0 s while denoising"
    assert stuck(beat([running("denoising", 100, %{step_ms: 1})])) == nil
    assert stuck(beat([running("denoising", 101, %{step_ms: 1})])) =~ "over 0.1 s"
    assert stuck(beat([running("denoising", 300, %{step_ms: 30})])) == nil
    assert stuck(beat([running("denoising", 301, %{step_ms: 30})])) =~ "over 0.3 s"
    # What comes after the last step is work of another kind.
    assert stuck(beat([running("encoding", 999, %{step_ms: 1})])) == nil
  end

  test "who was told to stop has its own limit, from then on, for its own work" do
    outstays = fn request, told, now ->
      Health.outstays(beat([request]), told, now, cancel_timeout: 100)
    end

    for phase <- ~w(loading denoising decoding encoding) do
      request = running(phase, 1_000)
      assert outstays.(request, %{}, 1_000) == nil
      assert outstays.(request, %{"r2" => 0}, 1_000) == nil
      assert outstays.(request, %{"r1" => 900}, 1_000) == nil
      assert outstays.(request, %{"r1" => 899}, 1_000) =~ "over 0.1 s while #{phase}"
      assert outstays.(%{request | waits: true}, %{"r1" => 0}, 1_000) == nil
      # The pass that it waited for is over just now.
      assert outstays.(running(phase, 100), %{"r1" => 0}, 1_000) == nil
      assert outstays.(Map.delete(request, :waits), %{"r1" => 0}, 1_000) =~ "r1 was told"
    end
  end

  test "a load has the load timeout, also one that no request waits for" do
    load = fn age -> %{loads: [%{model: "a/b", age_ms: age}]} end
    assert stuck(beat([], load.(9_000))) == nil
    assert stuck(beat([], load.(9_001))) =~ "the load of a/b has taken over 9.0 s"
    assert stuck(beat([running("loading", 9_000)])) == nil
    assert stuck(beat([running("loading", 9_001)])) =~ "while loading"
    patient = [stall_timeout: 1_000, stall_floor: 100, load_timeout: 123_456]
    assert Health.stuck(beat([], load.(123_457)), patient) =~ "over 123.5 s"
  end

  test "all who wait for nobody are stuck" do
    waits = fn age -> running("denoising", age, %{waits: true}) end
    assert stuck(beat([waits.(1_000), waits.(5_000)])) == nil
    assert stuck(beat([waits.(1_001), waits.(5_000)])) =~ "nothing is worked on"
    assert stuck(beat([waits.(1_001), running("encoding", 0)])) == nil
  end

  test "of an older process without these fields each request is judged by its age" do
    old = &Map.delete(running("denoising", &1), :waits)
    assert stuck(beat([old.(1_000)])) == nil
    assert stuck(beat([old.(1_001)])) =~ "has not moved"
  end

  describe "silence" do
    @clocks %{now: 10_000, heard_at: 10_000, start_by: 20_000, asked_at: []}

    defp overdue(state, changes) do
      config = [heartbeat_timeout: 1_000, start_timeout: 7_000]
      Health.overdue(state, Map.merge(@clocks, Map.new(changes)), config)
    end

    test "is a hang, but of one that imports" do
      for state <- [:started, :ready] do
        assert overdue(state, heard_at: 9_000) == nil
        assert overdue(state, heard_at: 8_999) == {:stalls, "no heartbeat for 1001 ms"}
      end

      assert overdue(:greeted, heard_at: 0) == nil
    end

    test "is a start that takes too long, until it is ready" do
      for state <- [:started, :greeted] do
        assert overdue(state, start_by: 10_000) == nil
        assert overdue(state, start_by: 9_999) == {:fails, "it was not ready after 7000 ms"}
      end

      assert overdue(:ready, start_by: 9_999) == nil
    end

    test "on what it was asked is a hang" do
      assert overdue(:ready, asked_at: [9_000, 10_000]) == nil

      assert overdue(:ready, asked_at: [10_000, 8_999]) ==
               {:stalls, "it does not work on what it was asked"}
    end
  end
end
