from pangu.engines.megatron.fitting import select_backend

select_backend("cpu")
