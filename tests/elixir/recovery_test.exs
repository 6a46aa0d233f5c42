defmodule StarweaveImage.RecoveryTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Job, Recovery}

  @begun 1_700_000_000_000

  defp request do
    {:ok, request} =
      Request.new("a fig",
        id: "a",
        seed: 1,
        durable: true,
        timeout: 60_000,
        instance: Some.Instance
      )

    request
  end

  defp unfinished(record, wall),
    do: Recovery.unfinished(%{id: "a", job: record, attempts: 2}, Some.Instance, wall)

  test "a request goes on as it was, with what is left of its time" do
    record = Recovery.record(request(), @begun)
    assert {:ok, %Job{status: :open} = job, 50_000} = unfinished(record, @begun + 10_000)
    assert job.request == request()
    assert {job.ends, job.submitted?} == {2, true}
  end

  test "its time is over, or not yet begun, whatever became of the clock" do
    record = Recovery.record(request(), @begun)
    assert {:ok, _, 0} = unfinished(record, @begun + 60_000)
    assert {:ok, _, 0} = unfinished(record, @begun + 600_000_000)
    assert {:ok, _, 60_000} = unfinished(record, @begun - 600_000_000)
  end

  test "one that this version cannot read has ended with the reason" do
    record = Recovery.record(request(), @begun)
    record = put_in(record["request"]["steps"], "many")
    assert {:error, job} = unfinished(record, @begun)
    assert %Job{status: :finished, result: {:error, %Error{kind: :invalid_request}}} = job
    assert {job.request.id, job.request.durable} == {"a", true}
    # Nobody asks for the same, but the id is free.
    refute Request.same?(job.request, request())
    assert Job.failed?(job)
  end

  describe "a result on disk" do
    defp finished(record, wall, outcome \\ :ok) do
      entry = %{id: "a", finished_at: @begun, outcome: outcome}
      Recovery.finished(entry, record, Some.Instance, wall, 1_000)
    end

    test "is kept for what is left of its time" do
      record = {:ok, %{job: Recovery.record(request(), @begun - 5_000)}}

      assert {%Job{status: :finished, result: {:stored, :ok}} = job, 400} =
               finished(record, @begun + 600)

      assert Request.same?(job.request, request())
      assert {_, 0} = finished(record, @begun + 5_000)
      assert {_, 1_000} = finished(record, @begun - 5_000)
    end

    test "is there also where the request itself cannot be read" do
      assert {%Job{result: {:stored, :error}} = job, _} =
               finished({:error, "damaged"}, @begun, :error)

      assert job.request.id == "a"
      record = {:ok, %{job: %{"request" => %{"prompt" => 7}}}}
      assert {%Job{result: {:stored, :ok}}, _} = finished(record, @begun)
    end
  end

  test "who keeps nothing says why" do
    assert %Error{kind: :unavailable, message: message} = Recovery.not_kept("the disk is full")
    assert message == "the request cannot be kept on disk: the disk is full"
  end
end
